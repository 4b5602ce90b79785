"""Statistics of real batches are compared with a recomputation in float64."""

import copy

import numpy as np
import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab
from bnlab.errors import UsageError
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.passes.subject import Subject


def inputs_of(model, layers, data):
    """Return every input of every layer, batch by batch, in float64, with every BN layer on batch statistics."""
    seen = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda module, x, name=name: seen[name].append(x[0].double()))
        for name, layer in layers.items()
    ]
    model = model.eval()
    with torch.no_grad(), impose_batch_statistics(model):
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return seen


def per_channel(x):
    return x.movedim(1, -1).reshape(-1, x.size(1)).numpy()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_are_those_of_float64(name):
    model = build(name).double()
    data = [images(size).double() for size in (8, 8, 5)]
    layers = any_batch_norm(model)
    observed = observe(Subject(model), layers, data)
    assert observed.keys() == layers.keys()
    for path, inputs in inputs_of(model, layers, data).items():
        seen, values = observed[path], [per_channel(x) for x in inputs]
        whole = np.concatenate(values)
        assert (seen.batches, seen.images, seen.count) == (3, 21, len(whole))
        assert seen.smallest_count == min(map(len, values))
        for mine, expected in (
            (seen.mean, whole.mean(0)),
            (seen.var, whole.var(0, ddof=1)),
            (seen.within_mean, np.mean([v.mean(0) for v in values], 0)),
            (seen.within_var, np.mean([v.var(0, ddof=1) for v in values], 0)),
            (seen.batch_mean_var, np.var([v.mean(0) for v in values], 0, ddof=1)),
        ):
            np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-12)


def test_a_row_of_each_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, eps=0.1)).double()
    data = [offset + (1 + offset) * torch.randn(6, 3, 4, 4).double() for offset in (0.0, 1.0, 0.5)]
    rows = observe(Subject(model), any_batch_norm(model), data)["0"].batch_rows
    means = np.array([per_channel(x).mean(0) for x in data])
    variances = np.array([per_channel(x).var(0, ddof=1) for x in data])
    spread = variances.mean(0) + 0.1
    np.testing.assert_allclose(rows[:, :3], (means - means.mean(0)) / np.sqrt(spread))
    np.testing.assert_allclose(rows[:, 3:], np.log((variances + 0.1) / spread) / 2)


def test_a_wrong_answer_is_caught():
    """The average of the variances of unequal batches is not the total variance."""
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    data = [torch.randn(4, 2).double(), 10 + torch.randn(40, 2).double()]
    seen = observe(Subject(model), any_batch_norm(model), data)["0"]
    whole = torch.cat(data).numpy()
    np.testing.assert_allclose(seen.var, whole.var(0, ddof=1))
    assert (np.abs(seen.within_var / whole.var(0, ddof=1) - 1) > 0.5).all()


def test_sample_means_give_honest_standard_errors():
    """The positions of one image are not independent: the naive error would be seven times too small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1))
    data = [torch.randn(64, 1, 1, 1) * 0.7 + 0.5 * torch.randn(64, 1, 7, 7) for _ in range(30)]
    seen = observe(Subject(model), any_batch_norm(model), data)["0"]
    true = (0.49 + 0.25 / 49) ** 0.5 / (64 * 30) ** 0.5
    assert seen.mean_error[0] == pytest.approx(true, rel=0.15)
    assert (seen.var[0] / seen.count) ** 0.5 < true / 5


KINDS = [
    nn.BatchNorm2d,
    bnlab.nn.BatchNorm2d,
    bnlab.nn.GhostBatchNorm2d,
    bnlab.nn.BatchRenorm2d,
    bnlab.nn.FrozenBatchNorm2d,
    nn.SyncBatchNorm,
    lambda c: nn.BatchNorm2d(c, affine=False),
    lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    lambda c: nn.BatchNorm2d(c, momentum=None),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_any_kind_of_layer_and_nothing_is_touched(kind, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4), nn.Dropout(), nn.Conv2d(4, 2, 1), kind(2)).train(training)
    x = 3 + images(6)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    buffers = [id(b) for b in model.buffers()]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    seen = observe(Subject(model), any_batch_norm(model), [x, x], dropping={"2"})
    assert torch.equal(torch.rand(1), expected)
    values = per_channel(model[0](x).detach().double())
    np.testing.assert_allclose(seen["1"].mean, values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["1"].within_var, values.var(0, ddof=1), rtol=1e-4)
    assert [m.training for m in model.modules()] == modes
    assert [id(b) for b in model.buffers()] == buffers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_where_torchs_own_statistics_are_wrong_they_are_computed_again():
    model = nn.Sequential(nn.BatchNorm2d(2))
    x = (1e6 + 0.1 * torch.randn(32, 2, 16, 16)).to(memory_format=torch.channels_last)
    seen = observe(Subject(model), any_batch_norm(model), [x])["0"]
    values = per_channel(x.double())
    np.testing.assert_allclose(seen.within_var, values.var(0, ddof=1), rtol=1e-9)
    assert seen.own_error > 0


def test_overflow_and_batches_that_are_not_finite():
    model = nn.Sequential(nn.BatchNorm1d(2))
    x = torch.randn(8, 2)
    seen = observe(Subject(model), any_batch_norm(model), [x, 1e25 * x, torch.full((8, 2), float("nan"))])["0"]
    assert (seen.batches, seen.overflowed, seen.not_finite) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, x = build("resnet").to(dtype), images(8).to(dtype)
    seen = observe(Subject(model), any_batch_norm(model), [x])
    assert len(seen) == 10
    assert seen["bn1"].input_eps == torch.finfo(dtype).eps


def test_a_forward_stops_behind_the_last_layer():
    ran = []

    class Tail(nn.Module):
        def forward(self, x):
            ran.append(len(x))
            return x

    model = nn.Sequential(nn.BatchNorm1d(2), Tail())
    observe(Subject(model), any_batch_norm(model), [torch.randn(4, 2)] * 5)
    assert ran == [4]


def test_batches_of_other_paths_run_to_their_end():
    class Paths(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if len(x) > 4 else x

    model = Paths()
    seen = observe(Subject(model), any_batch_norm(model), [torch.randn(n, 2) for n in (4, 8, 8, 4, 8)])
    assert (seen["a"].batches, seen["b"].batches) == (5, 3)


def test_one_value_per_channel_everywhere_is_refused_with_the_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UsageError) as err:
        observe(Subject(model), any_batch_norm(model), [torch.randn(1, 2)])
    assert str(err.value) == "1: data must leave more than 1 value per channel in each batch, got 1."
    assert isinstance(model[1], _BatchNorm)
    assert model[1].momentum == 0.1


def test_a_last_batch_of_one_sample_is_left_out_and_noted():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    data = [torch.randn(n, 2) for n in (8, 8, 1)]
    skipped = set()
    assert observe(Subject(model), any_batch_norm(model), data, skipped=skipped)["1"].batches == 2
    assert skipped == {2}
    diagnosis = bnlab.check(model, data=data, metric=lambda model, batches: sum(float(model(x).sum()) for x in batches))
    assert "data: 1 batch was left out: one value per channel has no variance" in diagnosis.notes
    assert diagnosis.numbers is not None


@pytest.mark.parametrize(("spoiled", "note"), [((), None), ((1,), "1 batch was"), ((0, 2), "2 batches were")])
def test_batches_with_nan_are_left_out_and_noted(spoiled, note):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    data = [torch.randn(8, 2) for _ in range(3)]
    for index in spoiled:
        data[index][0, 0] = float("nan")
    not_finite = set()
    observe(Subject(model), any_batch_norm(model), data, not_finite=not_finite)
    assert not_finite == set(spoiled)
    notes = bnlab.check(model, data=data).notes
    assert [each for each in notes if "NaN" in each] == (
        [] if note is None else [f"data: {note} left out of every layer that gets a NaN or inf"]
    )
