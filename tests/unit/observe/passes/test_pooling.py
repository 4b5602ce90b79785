"""Pooled statistics are those of all values together, and each batch counts wholly or not at all."""

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.pooling import End, pool
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


class Counting:
    """A loader that counts how many batches are fetched."""

    def __init__(self, batches):
        self.batches, self.fetched = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.fetched += 1
            yield batch


def test_pooling_stops_at_the_standard_error_or_the_number_of_batches(model):
    data = Counting([torch.randn(64, 3) for _ in range(60)])
    layers = any_batch_norm(model)
    limited = pool(Subject(model), layers, data, max_batches=3)
    assert (limited.batches, data.fetched, limited.end) == (3, 3, End.LIMIT)
    data.fetched = 0
    early = pool(Subject(model), layers, data, standard_error=0.2)
    assert (early.batches, data.fetched, early.end) == (8, 8, End.REACHED)
    data.fetched = 0
    later = pool(Subject(model), layers, data, standard_error=0.04)
    assert 12 < later.batches == data.fetched < 50
    errors = later.standard_errors("population")
    assert max(error.value for error in errors.values()) <= 0.04
    assert errors == {path: pooled.standard_error("population") for path, pooled in later.layers.items()}
    assert pool(Subject(model), layers, data, standard_error=1e-4).end is End.DATA


def test_no_more_batches_are_read_than_the_standard_error_needs(model):
    """Whoever has read n batches needs n (error/wanted)^2; the looks are a sixteenth apart at most."""
    data = [torch.randn(32, 3) for _ in range(400)]
    layers = any_batch_norm(model)
    used = pool(Subject(model), layers, data, standard_error=0.02).batches
    before = pool(Subject(model), layers, data, max_batches=used - used // 10)
    assert max(error.value for error in before.standard_errors("population").values()) > 0.02


def test_batches_that_are_left_out_do_not_count_as_read(model):
    spoiled = torch.full((8, 3), float("nan"))
    data = Counting([torch.randn(64, 3) if index % 2 else spoiled for index in range(40)])
    pooling = pool(Subject(model), any_batch_norm(model), data, standard_error=0.5)
    assert (pooling.batches, pooling.not_finite, data.fetched) == (8, 8, 16)


def test_a_layer_that_has_not_run_often_enough_keeps_the_pass_going():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.first(x) if len(x) == 8 else self.second(x)

    model = Turns()
    data = [torch.randn(9 if index == 2 else 8, 3) for index in range(20)]
    pooling = pool(Subject(model), any_batch_norm(model), data, standard_error=1.0)
    assert pooling.end is End.DATA
    assert set(pooling.standard_errors("population")) == {"first"}


def test_the_error_of_what_is_stored_is_that_of_the_estimator():
    """Batches with levels of their own: their variances are alike, and the variance of all values is not known."""
    layer = nn.BatchNorm1d(4)
    levels = torch.randn(12, 1, 4, generator=torch.Generator().manual_seed(3))
    pooled = pool(Subject(layer), {"": layer}, list(levels + 0.1 * torch.randn(12, 500, 4))).layers[""]
    assert pooled.errors.within_var.max() / pooled.within_var.max() < 0.05
    assert pooled.errors.population_var.min() / pooled.population_var.max() > 0.1
    assert pooled.standard_error("within-batch").of == "mean"


@pytest.mark.parametrize("kind", ["grouped in runs", "sorted, all the same so far", "drifting"])
def test_batches_in_some_order_claim_no_standard_error(kind):
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm1d(8)
    if kind == "drifting":
        levels = torch.linspace(0, 3, 40)
    else:
        levels = torch.tensor([0.0, 2.0, 1.0, 3.0]).repeat_interleave(10)
    data = [level + torch.randn(32, 8, generator=generator) for level in levels]
    pairs = [(x, torch.full((32,), int(10 * level))) for x, level in zip(data, levels, strict=True)]
    of_labels = Labels() if kind.startswith("sorted") else None
    wanted = 0.05 if of_labels else None
    pooling = pool(
        Subject(layer), {"": layer}, pairs if of_labels else data, standard_error=wanted, data_order=of_labels
    )
    assert (pooling.batches, pooling.end) == (40, End.DATA)
    assert pooling.standard_errors("population") == {}
    assert pooling.order == ("labels" if of_labels else "successive batches are alike")


class Labels:
    """Stands for an order that the labels show."""

    def add(self, batch):
        assert len(batch) == 2

    def clue(self, *, is_everything):
        return "labels"


def test_no_usable_batch_is_an_error(model):
    with pytest.raises(UsageError, match="there must be at least one, got none"):
        pool(Subject(model), any_batch_norm(model), [])
    with pytest.raises(UsageError, match="at least one must be finite, got 1"):
        pool(Subject(model), any_batch_norm(model), [torch.full((4, 3), float("nan"))])
