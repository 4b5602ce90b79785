"""Pooled statistics are those of all values together, and each batch counts wholly or not at all."""

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.pooling import pool
from bnlab.observe.passes.subject import Subject


@pytest.fixture
def model():
    return nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))


def test_both_estimators_against_all_values_in_float64(model):
    data = [3 * torch.randn(n, 3) + n for n in (5, 40, 11)]
    pooled = pool(Subject(model), any_batch_norm(model), data).layers["0"]
    values = torch.cat(data).double().numpy()
    np.testing.assert_allclose(pooled.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pooled.var("population"), values.var(0, ddof=1), rtol=1e-6)
    weights = np.array([len(batch) for batch in data])
    within = np.array([batch.double().numpy().var(0, ddof=1) for batch in data])
    np.testing.assert_allclose(
        pooled.var("within-batch"), (weights[:, None] * within).sum(0) / weights.sum(), rtol=1e-6
    )
    assert not np.allclose(pooled.var("population"), pooled.var("within-batch"), rtol=0.1)


def test_a_batch_counts_for_every_layer_or_for_none(model):
    spoiled = torch.randn(8, 3)
    spoiled[0, 0] = float("inf")
    pooling = pool(
        Subject(model), any_batch_norm(model), [torch.randn(8, 3), spoiled, torch.randn(1, 3), torch.randn(9, 3)]
    )
    assert (pooling.batches, pooling.samples, pooling.not_finite, pooling.one_value) == (2, 17, 1, 1)
    assert {pooled.count for pooled in pooling.layers.values()} == {17}


def test_imposed_statistics_are_what_other_layers_normalise_with(model):
    first, second = model[0], model[2]
    x = torch.randn(64, 3)
    imposed = {first: (np.full(3, -100.0), np.ones(3))}
    pooled = pool(Subject(model), {"2": second}, [x], imposed=imposed).layers["2"]
    expected = ((x.double() + 100) / np.sqrt(1 + 1e-5)).mean(0).numpy()
    np.testing.assert_allclose(pooled.mean, expected, rtol=1e-5)
    assert torch.equal(first.running_mean, torch.zeros(3))


def test_pooling_stops_at_the_tolerance_or_the_number_of_batches(model):
    data = [torch.randn(64, 3) for _ in range(30)]
    layers = any_batch_norm(model)
    assert pool(Subject(model), layers, data, max_batches=3).batches == 3
    early = pool(Subject(model), layers, data, tolerance=0.2)
    assert early.stopped_early
    assert early.batches == 8


def test_no_usable_batch_is_an_error(model):
    with pytest.raises(UsageError, match="there must be at least one, got none"):
        pool(Subject(model), any_batch_norm(model), [])
    with pytest.raises(UsageError, match="at least one must be finite, got 1"):
        pool(Subject(model), any_batch_norm(model), [torch.full((4, 3), float("nan"))])
