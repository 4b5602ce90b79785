"""The split of the gap agrees with a recomputation value by value."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnlab.observe.discover import any_batch_norm
from bnlab.observe.gap import CAUSES, RunningStatistics, layer_gap, shares
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject

EPS = 1e-5


def observed(data, channels=3):
    model = nn.Sequential(nn.BatchNorm1d(channels)).double()
    return observe(Subject(model), any_batch_norm(model), data)["0"]


def running(mean, var, *, dtype="float64", momentum=0.1):
    return RunningStatistics(mean=np.asarray(mean), var=np.asarray(var), dtype=dtype, momentum=momentum, eps=EPS)


def batches(seed, count=6, shift=0.0, scale=1.0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return [shift + scale * torch.randn(size, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def normalised(x, mean, var):
    return (x - mean) / np.sqrt(var + EPS)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-3, 3), scale=st.floats(0.1, 5), size=st.integers(2, 20))
def test_the_square_is_that_of_the_values_and_the_parts_add_up(seed, shift, scale, size):
    data = batches(seed, size=size)
    train = batches(seed + 1, shift=shift, scale=scale)
    mean, var = np.array([0.3, -1.0, 2.0]), np.array([0.5, 2.0, 1.0])
    gap = layer_gap(running(mean, var), observed(data), observed(train), observed(batches(seed + 2)))
    squares = []
    for batch in data:
        x = batch.numpy()
        squares.append((normalised(x, mean, var) - normalised(x, x.mean(0), x.var(0))) ** 2)
    expected = np.concatenate(squares).mean(0)
    np.testing.assert_allclose(gap.per_channel, expected, rtol=1e-8)
    assert gap.square == pytest.approx(expected.mean(), rel=1e-8)
    assert sum(gap.by_cause.values()) == pytest.approx(gap.square, rel=1e-8)
    assert set(gap.by_cause) <= set(CAUSES)


def by_hand(data, links):
    """Return the parts <d_k, d_total> of a chain of (mean, var) per batch, computed value by value."""
    total = dict.fromkeys(range(len(links) - 1), 0.0)
    count = 0
    for batch in data:
        x = batch.numpy()
        outputs = [normalised(x, *link(x)) for link in links]
        for k in total:
            total[k] += ((outputs[k + 1] - outputs[k]) * (outputs[-1] - outputs[0])).sum()
        count += x.size
    return [value / count for value in total.values()]


def test_each_link_is_that_of_the_values():
    data, train = batches(0), batches(1, shift=1.0, scale=2.0)
    seen, trained = observed(data), observed(train)
    buffers = np.array([4.0, -3.0, 5.0]), np.array([9.0, 0.1, 30.0])
    gap = layer_gap(running(*buffers, momentum=None), seen, trained)
    shifted = seen.within_mean + trained.mean - seen.mean, seen.within_var * trained.var / seen.var
    parts = by_hand(
        data,
        [
            lambda x: (x.mean(0), x.var(0)),
            lambda x: (x.mean(0), x.var(0, ddof=1)),
            lambda x: (seen.within_mean, seen.within_var),
            lambda x: shifted,
            lambda x: (trained.within_mean, trained.within_var),
            lambda x: buffers,
        ],
    )
    bessel, between, shift, training, staleness = parts
    by_cause = gap.by_cause
    assert by_cause["bessel"] == pytest.approx(bessel, rel=1e-8)
    noise = sum(parts) - sum(value for cause, value in by_cause.items() if cause != "sampling noise")
    assert by_cause["sampling noise"] == pytest.approx(noise, rel=1e-8)
    assert abs(by_cause["staleness"]) <= abs(staleness) + 1e-12
    assert by_cause["staleness"] == pytest.approx(staleness, rel=0.1)
    assert by_cause["shift"] == pytest.approx(shift, rel=0.3)
    assert abs(by_cause["heterogeneity"]) < abs(between) + 1e-12
    assert abs(by_cause.get("training heterogeneity", 0.0)) <= abs(training) + 1e-12


def test_the_same_batch_for_ever_is_pure_bessel():
    """Training on one batch of two values for ever leaves a gap that only Bessel's correction causes, not momentum."""
    batch = torch.tensor([[1e5], [2e5]], dtype=torch.float64)
    seen = observed([batch] * 4, channels=1)
    x = batch.numpy()
    gap = layer_gap(running(x.mean(0), x.var(0, ddof=1)), seen)
    assert gap.by_cause["bessel"] == pytest.approx(gap.square, rel=1e-6)
    assert gap.square**0.5 == pytest.approx(1 - 0.5**0.5, rel=1e-4)
    assert gap.excess == pytest.approx(0, abs=1e-3)


def largest(gap):
    return max(gap.by_cause, key=gap.by_cause.get)


def test_every_cause_is_named():
    data = batches(0, count=40)
    seen = observed(data)
    right = seen.within_mean, seen.within_var
    assert largest(layer_gap(running(right[0] + 1, right[1]), seen)) == "staleness or shift"
    assert largest(layer_gap(running(right[0] + 1, right[1]), seen, observed(batches(9, count=40)))) == "staleness"
    shifted = observed(batches(3, count=40, shift=2.0))
    assert largest(layer_gap(running(shifted.within_mean, shifted.within_var), seen, shifted)) == "shift"
    dropped = observed(batches(4, count=40, scale=2.0))
    assert largest(layer_gap(running(dropped.within_mean, dropped.within_var), seen, seen, dropped)) == "dropout"
    assert largest(layer_gap(running(*right), seen)) == "sampling noise"
    ordered = [sorted_batch for value in (-3.0, 0.0, 3.0) for sorted_batch in batches(5, shift=value, count=10)]
    seen = observed(ordered)
    assert largest(layer_gap(running(seen.within_mean, seen.within_var), seen)) == "heterogeneity"
    stuck = running(right[0] + 0.03, right[1] * 1.03, dtype="bfloat16", momentum=0.01)
    big = observed(batches(6, count=400, size=200))
    stuck = running(big.within_mean + 2, big.within_var, dtype="bfloat16", momentum=0.001)
    assert largest(layer_gap(stuck, big)) == "precision"
    single = running(big.within_mean + 2, big.within_var, dtype="float32", momentum=0.001)
    assert largest(layer_gap(single, big)) == "staleness or shift"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.0])
def test_statistics_that_have_no_root_give_a_finite_gap(bad):
    seen = observed(batches(0))
    gap = layer_gap(running(seen.within_mean, np.full(3, bad)), seen)
    assert np.isfinite(gap.square)
    assert gap.square > 0.5


def test_shares_add_up_and_name_layers():
    seen = observed(batches(0, count=30))
    gaps = {
        "small": layer_gap(running(seen.within_mean + 0.1, seen.within_var), seen),
        "large": layer_gap(running(seen.within_mean + 2, seen.within_var), seen),
    }
    share_by_cause = shares(gaps)
    assert sum(share for share, _ in share_by_cause.values()) == pytest.approx(1.0)
    assert next(iter(share_by_cause)) == "staleness or shift"
    assert share_by_cause["staleness or shift"][1] == ("large",)
    assert shares({}) == {}
