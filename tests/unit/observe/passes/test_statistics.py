"""The measured statistics are exact for every kind of layer, and diagnosis and recalibration agree on them."""

import numpy as np
import pytest
import torch
from tests.host_reads import as_on_a_device
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.pooling import pool
from bnlab.observe.passes.statistics import Beside, measuring
from bnlab.observe.passes.subject import Subject


class Shifting(nn.BatchNorm1d):
    """A BN layer that changes its input before BN."""

    def forward(self, input):
        return super().forward(input + 10)


class Own(nn.Module):
    """A BN layer of another class."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var)


def calls_of(model, data, **options):
    calls = []
    with measuring(Subject(model), any_batch_norm(model), calls.append, **options) as run:
        ends = [run.one_batch(batch) for batch in data]
    return calls, ends


@pytest.mark.parametrize(
    ("layer", "offset"),
    [
        (nn.BatchNorm1d(3), 0),
        (bnlab.nn.BatchNorm1d(3), 0),
        (Own(3), 0),
        (Shifting(3), 10),
        (nn.BatchNorm1d(3).double(), 0),
    ],
    ids=["torch", "bnlab", "own class", "changes its input", "float64"],
)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_every_call_is_exact(layer, offset, mean):
    x = mean + torch.randn(200, 3)
    x = x.double() if next(layer.buffers()).dtype == torch.float64 else x
    (call,), ends = calls_of(nn.Sequential(layer), [x])
    values = x.double().numpy() + offset
    std = values.std(0)
    tolerance = (1e-2 if mean else 1e-5) if offset else 1e-6  # an offset hides the input of BN
    assert (abs(call.mean - values.mean(0)) <= tolerance * std).all()
    assert (abs(call.var / values.var(0, ddof=1) - 1) <= 100 * tolerance).all()
    assert (call.path, call.count, ends) == ("0", 200, [None])


def test_a_planted_error_of_a_thousandth_would_be_seen():
    x = torch.randn(200, 3)
    (call,), _ = calls_of(nn.Sequential(nn.BatchNorm1d(3)), [x + 1e-3])
    assert (abs(call.mean - x.double().numpy().mean(0)) > 1e-6).all()


def test_both_users_agree_on_every_moment():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    data, layers = [torch.randn(n, 3, 9, 9) for n in (8, 3, 16)], any_batch_norm(model)
    seen, pooled = observe(Subject(model), layers, data), pool(Subject(model), layers, data).layers
    for path in layers:
        np.testing.assert_allclose(seen[path].mean, pooled[path].mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(seen[path].var, pooled[path].population_var, rtol=1e-10)
        assert (seen[path].batches, seen[path].count) == (pooled[path].batches, pooled[path].count)


def test_values_that_are_not_finite_differ_from_single_values():
    model = nn.Sequential(nn.BatchNorm1d(2))
    calls, ends = calls_of(model, [torch.randn(4, 2), torch.full((4, 2), float("nan")), torch.randn(1, 2)])
    assert [call.is_finite for call in calls] == [True, False]
    assert ends == [None, None, "0"]


def test_dropout_stays_off_or_on_though_a_forward_changes_the_mode():
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.bn = nn.Dropout(0.9), nn.BatchNorm1d(2)

        def forward(self, x):
            self.train(not self.training)
            return self.bn(self.drop(x))

    x = torch.ones(64, 2)
    for dropping, varies in (((), False), (("drop",), True)):
        calls, _ = calls_of(Switching(), [x, x], dropping=dropping)
        assert [bool((call.var > 0).all()) for call in calls] == [varies, varies]


def test_statistics_of_a_layer_that_are_not_finite_are_counted(monkeypatch):
    """The kernel of torch, which runs on an accelerator, overflows where the exact statistics do not."""
    monkeypatch.setattr("bnlab.observe.passes.scratch._runs_on_kernels", lambda layer, **options: False)
    model = nn.Sequential(nn.BatchNorm1d(2))
    x = torch.randn(8, 2) * 1e25
    (call,), _ = calls_of(model, [x], wants_own=True)
    assert call.own_failed
    assert call.is_finite
    assert observe(Subject(model), any_batch_norm(model), [x])["0"].overflowed == 1


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnlab.nn.BatchNorm2d])
def test_calls_on_a_device_wait_and_come_with_the_same_values_in_the_same_order(kind, monkeypatch):
    def run(model, data):
        def look(path, x, mean):
            return Beside([x.amax((0, 2, 3)), mean], x.size(0))

        return calls_of(model, data, look=look, wants_own=True)[0]

    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 5, 3), kind(5))
    data = [torch.randn(n, 3, 9, 9) for n in (8, 3, 16)]
    expected = run(model, data)
    as_on_a_device(monkeypatch)
    taken = run(model, data)
    shapes = [(n, c, side, side) for n in (8, 3, 16) for c, side in ((4, 7), (5, 5))]
    assert [call.shape for call in taken] == shapes
    assert [(call.path, call.batch) for call in taken] == [(path, batch) for batch in range(3) for path in ("1", "4")]
    for call, other in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(call.mean, other.mean)
        np.testing.assert_array_equal(call.var, other.var)
        assert call.beside.note == other.beside.note == call.shape[0]
        for value, other_value in zip(call.beside.tensors, other.beside.tensors, strict=True):
            assert torch.equal(value, other_value)


def test_a_call_on_a_device_is_taken_after_the_batch_and_not_before(monkeypatch):
    as_on_a_device(monkeypatch)
    calls, model = [], nn.Sequential(nn.BatchNorm1d(2))
    with measuring(Subject(model), any_batch_norm(model), calls.append) as run:
        run.one_batch(torch.randn(4, 2))
        run.then(lambda: calls.append("an action"))
        assert (calls, run.is_settled) == ([], False)
        run.one_batch(torch.randn(4, 2))
    assert [getattr(call, "batch", call) for call in calls] == [0, "an action", 1]


def test_every_kind_of_layer_is_exact_on_a_device_too(monkeypatch):
    as_on_a_device(monkeypatch)
    x = 1e3 + torch.randn(200, 3)
    for layer in (nn.BatchNorm1d(3), bnlab.nn.BatchNorm1d(3), Own(3), nn.SyncBatchNorm(3)):
        (call,), _ = calls_of(nn.Sequential(layer), [x])
        np.testing.assert_allclose(call.mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(call.var, x.double().var(0), rtol=1e-7)


def test_a_model_that_refuses_a_nan_behind_a_layer_ends_the_batch_on_a_device_as_well(monkeypatch):
    class Refusing(nn.Module):
        def forward(self, x):
            if bool(x.isnan().any()):
                raise ValueError("it does not take a NaN")
            return x

    model = nn.Sequential(nn.BatchNorm1d(2), Refusing(), nn.BatchNorm1d(2))
    spoiled = torch.full((4, 2), torch.nan)
    data = [torch.randn(8, 2), spoiled, torch.randn(8, 2)]
    expected = pool(Subject(model), any_batch_norm(model), data)
    as_on_a_device(monkeypatch)
    pooled = pool(Subject(model), any_batch_norm(model), data)
    assert (pooled.batches, pooled.not_finite) == (expected.batches, expected.not_finite) == (2, 1)
    with pytest.raises(ValueError, match="does not take"):
        pool(Subject(model), {"2": model[2]}, [spoiled])
