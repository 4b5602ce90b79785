"""recalibrate against moments of the captured activations, computed over everything at once in float64."""

from __future__ import annotations

import copy
import io
import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import architectures
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabWarning, NoBatchNorm, UsageError


def batch_norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def captured(model, batches):
    """Return the inputs of every layer on the CPU, all batches in a row, on batch statistics and with dropout off."""
    model = copy.deepcopy(model).cpu().eval()
    inputs = {}
    for name, layer in batch_norms(model).items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(batch.cpu())
    return inputs


def rows(x):
    return x.transpose(0, 1).flatten(1)


def truth(model, batches, estimator="population"):
    """Return mean and variance of every layer, from all values at once."""
    statistics = {}
    for name, inputs in captured(model, batches).items():
        everything = torch.cat([rows(x) for x in inputs], 1)
        var = everything.var(1)
        if estimator == "within-batch":
            counts = torch.tensor([rows(x).size(1) for x in inputs], dtype=torch.float64)
            var = sum(n * rows(x).var(1) for n, x in zip(counts, inputs, strict=True)) / counts.sum()
        statistics[name] = everything.mean(1), var
    return statistics


def errors(model, expected):
    """Return the largest error of a mean in standard deviations, and of a variance relative to it."""
    layers = batch_norms(model)
    pairs = [
        (
            ((layers[name].running_mean.cpu() - mean.cpu()).abs() / var.cpu().sqrt()).max(),
            ((layers[name].running_var.cpu() - var.cpu()) / var.cpu()).abs().max(),
        )
        for name, (mean, var) in expected.items()
    ]
    return max(float(mean) for mean, _ in pairs), max(float(var) for _, var in pairs)


def assert_right(model, expected, tolerance=1e-6):
    assert max(errors(model, expected)) <= tolerance


def snapshot(model):
    """Everything that must survive: values, objects, modes, settings, hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "momentum", None),
               getattr(m, "track_running_stats", None))
        for name, m in model.named_modules()
    }  # fmt: skip
    return {name: (id(t), t.detach().clone()) for name, t in tensors.items()}, own


def assert_as_before(model, before):
    tensors, own = before
    now, own_now = snapshot(model)
    assert own_now == own
    assert now.keys() == tensors.keys()
    for name, (identity, value) in tensors.items():
        assert now[name][0] == identity
        assert torch.equal(now[name][1], value) or (now[name][1].isnan() & value.isnan()).any(), name


def images(*sizes, channels=3, size=12):
    return [index + torch.randn(n, channels, size, size) * (1 + index) for index, n in enumerate(sizes)]


NETWORKS = [
    architectures.ResNet,
    architectures.PreActResNet,
    architectures.MobileNet,
    architectures.DenseNet,
]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("estimator", ["population", "within-batch"])
def test_statistics_are_those_of_all_activations_at_once(network, estimator, device):
    model, batches = network().to(device), images(8, 8, 5, 3)
    expected = truth(model, batches, estimator)
    receipt = bnlab.recalibrate(model, batches, estimator=estimator)
    assert_right(model, expected)
    assert {change.layer for change in receipt.changes.changes} == set(expected)


def test_the_oracle_catches_the_estimator_of_torch_and_a_biased_variance(device):
    model, batches = architectures.ResNet().to(device), images(8, 8, 5, 3)
    expected = truth(model, batches)
    update_bn([batch.to(device) for batch in batches], model)
    assert max(errors(model, expected)) > 0.1
    bnlab.recalibrate(model, batches)
    model.bn1.running_var *= 1 - 1 / (24 * 144)
    assert max(errors(model, expected)) > 1e-4


def test_a_sorted_and_ragged_loader(device):
    batches = [
        level + torch.randn(n, 4, dtype=torch.float64).to(device)
        for level, n in ((0, 64), (10, 64), (20, 64), (100, 4))
    ]
    model = nn.BatchNorm1d(4).to(device).double()
    bnlab.recalibrate(model, batches)
    everything = torch.cat(batches)
    assert_close(model.running_mean, everything.mean(0))
    assert_close(model.running_var, everything.var(0))
    assert (model.running_var > 200).all()
    bnlab.recalibrate(model, batches, estimator="within-batch")
    assert (model.running_var < 2).all()


@pytest.mark.parametrize("shape", [(32, 3), (32, 3, 5), (32, 3, 6, 6)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_huge_mean_with_a_tiny_spread(shape, channels_last, device):
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    batches = [1e4 + 0.1 * torch.randn(shape).to(device) for _ in range(4)]
    if channels_last and len(shape) == 4:
        batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
    model = layers[len(shape)](3)
    expected = {
        "": tuple(
            f(torch.cat([rows(b.double()) for b in batches], 1)) for f in (lambda v: v.mean(1), lambda v: v.var(1))
        )
    }
    bnlab.recalibrate(model, batches)
    mean_error, var_error = errors(model, expected)
    assert var_error <= 1e-6
    assert mean_error <= 2**-24 * 1e4 / 0.1 + 1e-6  # the buffer is float32


def test_channels_last_images_are_measured_exactly_where_the_kernel_of_torch_is_not(device):
    x = [(100 + torch.randn(16, 4, 64, 64).to(device)).to(memory_format=torch.channels_last) for _ in range(2)]
    expected = {"": (torch.cat(x).double().mean((0, 2, 3)), torch.cat(x).double().var((0, 2, 3)))}
    model = nn.BatchNorm2d(4).to(device)
    bnlab.recalibrate(model, x)
    assert errors(model, expected)[1] <= 1e-6


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), order=st.permutations(range(5)))
def test_how_samples_are_split_into_batches_does_not_matter(sizes, order, device):
    x = torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(len(sizes))).to(device) * 3 + 2
    parts = list(torch.split(x, sizes))
    model = nn.BatchNorm1d(3).to(device)
    bnlab.recalibrate(model, [parts[index] for index in order if index < len(parts)])
    assert_right(model, {"": (x.double().mean((0, 2)), x.double().var((0, 2)))})


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def test_layerwise_measures_each_layer_behind_final_ones(device):
    model, batches = network().to(device).double(), [batch.to(device).double() for batch in images(4, 4, 3)]
    first, second, x = model[0], model[4], torch.cat(batches)
    with torch.no_grad():
        a = first(x)
        mean, var = a.mean((0, 2, 3), keepdim=True), rows(a).var(1).reshape(1, -1, 1, 1)
        b = second(((a - mean) / (var + 1e-5).sqrt()).relu())
    bnlab.recalibrate(model, batches, layerwise=True)
    assert_close(model[1].running_mean, mean.flatten())
    assert_close(model[1].running_var, var.flatten())
    assert_close(model[5].running_mean, b.mean((0, 2, 3)))
    assert_close(model[5].running_var, rows(b).var(1))
    exact = model[5].running_var.clone()
    bnlab.recalibrate(model, batches)
    assert not torch.allclose(model[5].running_var, exact, rtol=1e-3)


def test_layerwise_does_not_depend_on_the_batches(device):
    x = torch.randn(24, 3, 12, 12, dtype=torch.float64).to(device)
    models = [network().to(device).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, size in zip(models, (2, 12), strict=True):
        bnlab.recalibrate(model, list(x.split(size)), layerwise=True)
    for left, right in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert_close(left, right)


class Failing:
    """A loader that breaks at its third batch."""

    def __iter__(self):
        yield from images(4, 4)
        raise OSError("disk full")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layerwise", [True, False])
def test_an_exception_at_the_third_batch_leaves_the_model_as_it_was(training, layerwise, device):
    model = network().to(device).train(training)
    before = snapshot(model)
    with pytest.raises(UsageError, match="disk full"):
        bnlab.recalibrate(model, Failing(), layerwise=layerwise)
    assert_as_before(model, before)


def test_an_interrupt_passes_and_leaves_the_model_as_it_was(device):
    model = network().to(device)
    before = snapshot(model)

    def forward(model, batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnlab.recalibrate(model, images(4), forward=forward)
    assert_as_before(model, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_batches_that_are_not_finite_are_left_out_and_counted(bad, device):
    model, batches = network().to(device), images(4, 4, 4)
    expected = truth(model, batches)
    poisoned = torch.randn(4, 3, 12, 12).to(device)
    poisoned[1, 2, 3, 4] = bad
    receipt = bnlab.recalibrate(model, [*batches[:1], poisoned, *batches[1:]])
    assert_right(model, expected)
    assert "left out: 1 batch in which a layer gets a NaN or inf" in receipt.changes.notes


def test_a_batch_that_turns_bad_halfway_reaches_no_layer(device):
    model, batches = network().to(device), images(4, 4)
    expected = truth(model, batches)
    calls = itertools.count()
    model[2].register_forward_hook(lambda *arguments: arguments[2] / 0 if next(calls) == 1 else None)
    bnlab.recalibrate(model, [batches[0], torch.randn(4, 3, 12, 12).to(device), batches[1]])
    assert_right(model, expected)


def test_a_batch_of_one_value_per_channel_is_left_out(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(device)
    batches = [torch.randn(8, 3).to(device), torch.randn(1, 3).to(device), torch.randn(6, 3).to(device)]
    expected = truth(model, [batches[0], batches[2]])
    receipt = bnlab.recalibrate(model, batches)
    assert_right(model, expected)
    assert "left out: 1 batch of one value per channel" in receipt.changes.notes


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: there must be at least one, got none."),
        ([torch.full((4, 3, 12, 12), math.nan)], "at least one must be finite, got 1 in which a layer gets a NaN"),
        (iter([torch.zeros(4, 3, 12, 12)]), "got a one-shot list_iterator"),
        (torch.zeros(4, 3, 12, 12), "got one tensor. Wrap it"),
        (3, "it must be an iterable of batches, got int"),
    ],
)
def test_loaders_that_hold_nothing_usable_leave_the_model_as_it_was(batches, message, device):
    model = network().to(device)
    before = snapshot(model)
    with pytest.raises(UsageError, match=message):
        bnlab.recalibrate(model, batches)
    assert_as_before(model, before)


@pytest.mark.parametrize("keep_counters", [True, False])
def test_only_values_of_running_statistics_and_counters_change(keep_counters, device):
    model = network().to(device)
    model(images(4)[0].to(device))
    model[1].eval()
    model[1].train()
    before = snapshot(model)
    bnlab.recalibrate(model, images(4, 4), keep_counters=keep_counters)
    tensors, own = before
    now, own_now = snapshot(model)
    assert own == own_now
    for name, (identity, value) in tensors.items():
        assert now[name][0] == identity
        changes = ("running_mean", "running_var", *(() if keep_counters else ("num_batches_tracked",)))
        assert torch.equal(now[name][1], value) != name.endswith(changes), name


def test_what_is_random_goes_on_as_if_nothing_had_happened(device):
    model, batches = network().to(device), images(4, 4)
    before = torch.get_rng_state()
    bnlab.recalibrate(model, batches, forward=lambda model, batch: model(batch + torch.rand(1).to(device)))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_may_be_tuples_dicts_or_anything_with_a_forward(device):
    batches = images(4, 4, 3)
    model = network().to(device)
    expected = truth(model, batches)
    bnlab.recalibrate(model, [(batch, torch.zeros(4).to(device)) for batch in batches])
    assert_right(model, expected)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, pixels, labels=None):
            return self.inner(pixels)

    named = Named()
    expected = truth(named.inner, batches)
    bnlab.recalibrate(named, [{"pixels": batch, "labels": None} for batch in batches])
    assert_right(named.inner, expected)
    changed = named.inner[1].running_mean.clone()
    bnlab.recalibrate(named.eval(), [7, 8], forward=lambda model, size: model(pixels=images(size)[0]))
    assert not torch.equal(named.inner[1].running_mean, changed)


def test_max_batches_and_a_loader_that_is_shorter(device):
    model, batches = network().to(device), images(4, 4, 4)
    expected = truth(model, batches[:2])
    bnlab.recalibrate(model, batches, max_batches=2)
    assert_right(model, expected)
    expected = truth(model, batches)
    receipt = bnlab.recalibrate(model, batches, max_batches=200)
    assert_right(model, expected)
    assert receipt.changes.notes[0].startswith("from 3 batches, 12 samples")


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_sets_the_mode_itself(training):
    class Setting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner.train(training)(x)

    model, batches = Setting(), images(4, 4)
    expected = truth(copy.deepcopy(model.inner), batches)
    bnlab.recalibrate(model, batches)
    assert_right(model.inner, expected)


class Far(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(3 * input + 1000)


class ChannelsBehind(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_subclass_that_changes_its_input_gets_the_statistics_of_what_its_bn_sees(channels_last, device):
    x = torch.randn(8, 4, 6, 6).to(device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layer = Far(4).to(device)
    bnlab.recalibrate(nn.Sequential(layer).to(device), [x])
    assert_close(layer.running_mean, (3 * x + 1000).mean((0, 2, 3)), rtol=1e-4, atol=1e-2)
    assert_close(layer.running_var, (3 * x + 1000).var((0, 2, 3)), rtol=1e-2, atol=1e-2)


def test_a_subclass_with_its_channels_elsewhere(device):
    x = torch.randn(8, 7, 4).to(device) * 2 + 1
    layer = ChannelsBehind(4).to(device)
    bnlab.recalibrate(nn.Sequential(layer).to(device), [x])
    assert_close(layer.running_mean, x.mean((0, 1)))
    assert_close(layer.running_var, x.flatten(0, 1).var(0))


def test_a_subclass_with_an_activation_is_measured_exactly_in_every_layout(device):
    x = (100 + torch.randn(16, 4, 64, 64).to(device)).to(memory_format=torch.channels_last)
    layer = WithActivation(4).to(device)
    bnlab.recalibrate(nn.Sequential(layer).to(device), [x])
    assert (
        errors(nn.Sequential(layer).to(device), {"0": (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3)))})[1]
        <= 1e-6
    )


def test_layerwise_with_a_bad_first_batch_and_a_layer_that_runs_later(device):
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.small(x) if len(x) == 4 else self.large(x)

    model, small, large = Turns().to(device), torch.randn(4, 3).to(device), torch.randn(9, 3).to(device)
    bnlab.recalibrate(
        model, [torch.full((4, 3), math.nan).to(device), torch.randn(1, 3).to(device), small, large], layerwise=True
    )
    assert_close(model.small.running_var, small.var(0))
    assert_close(model.large.running_var, large.var(0))


def test_layers_that_share_their_buffers_are_refused(device):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(device)
    model[2].running_mean = model[0].running_mean
    before = snapshot(model)
    with pytest.raises(UsageError, match="2: layer must have running statistics of its own, got those of 0"):
        bnlab.recalibrate(model, [torch.randn(4, 3).to(device)])
    assert_as_before(model, before)


def test_parameters_of_inference_mode_keep_nothing_from_being_put_back(device):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            with torch.inference_mode():
                self.linear = nn.Linear(3, 3)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n.add_(1)
            return self.bn(self.linear(x))

    model = Counting()
    bnlab.recalibrate(model, [torch.randn(4, 3).to(device), torch.randn(4, 3).to(device)])
    assert model.n == 0
    assert (model.bn.running_var != 1).all()


def test_layers_that_are_frozen_stay_so_unless_named(device):
    model = network().to(device).train()
    model[5].eval()
    before = model[5].running_var.clone()
    receipt = bnlab.recalibrate(model, images(4, 4))
    assert torch.equal(model[5].running_var, before)
    assert [(left.layer, left.reason) for left in receipt.changes.left_alone] == [
        ("5", "is in eval mode within a module in train mode: frozen")
    ]
    bnlab.recalibrate(model, images(4, 4), layers=["5"])
    assert not torch.equal(model[5].running_var, before)
    assert not model[5].training


def test_layers_that_are_not_named_run_on_their_running_statistics(device):
    model, x = network().to(device).double(), torch.randn(8, 3, 12, 12, dtype=torch.float64).to(device)
    model[1].running_mean += 3
    bnlab.recalibrate(model, [x], layers=["5"])
    with torch.no_grad():
        a = model[0](x)
        b = model[4](((a - 3) / math.sqrt(1 + 1e-5)).relu())
    assert_close(model[5].running_mean, b.mean((0, 2, 3)))
    assert (model[1].running_mean == 3).all()


def test_a_frozen_class_is_recalibrated_only_by_name(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bnlab.nn.FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to(
        device
    )
    bnlab.recalibrate(model, images(4, 4))
    assert (model[1].running_var == 1).all()
    batches = images(4, 4)
    bnlab.recalibrate(model, batches, layers=["1"])
    everything = rows(model[0](torch.cat(batches).to(device)).double())
    assert_close(model[1].running_var, everything.var(1).float())


def test_a_layer_that_never_runs_is_left_alone_and_reported(device):
    model = network().to(device)
    model.add_module("spare", nn.Identity().to(device))
    model.spare.bn = nn.BatchNorm2d(7).to(device)
    receipt = bnlab.recalibrate(model, images(4, 4))
    assert [(left.layer, left.reason) for left in receipt.changes.left_alone] == [
        ("spare.bn", "never ran on these batches")
    ]
    assert (model.spare.bn.running_var == 1).all()


def test_a_shared_layer_gets_what_all_its_calls_see(device):
    bn = nn.BatchNorm2d(4).to(device)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn, nn.Conv2d(4, 4, 3), bn).to(device).double()
    batches = [batch.double() for batch in images(4, 3)]
    inputs = captured(model, batches)["1"]
    everything = torch.cat([rows(x) for x in inputs], 1).to(device)
    bnlab.recalibrate(model, batches)
    assert_close(bn.running_mean, everything.mean(1))
    assert_close(bn.running_var, everything.var(1))


def test_layers_without_statistics(device):
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).to(device)
    with pytest.raises(UsageError, match="0: layer must keep running statistics to be recalibrated"):
        bnlab.recalibrate(model, [torch.randn(4, 3).to(device)])
    mixed = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)).to(device)
    receipt = bnlab.recalibrate(mixed, [torch.randn(4, 3).to(device)])
    assert receipt.changes.left_alone[0].reason == "keeps no running statistics"
    with pytest.raises(UsageError, match="0: layer must keep"):
        bnlab.recalibrate(mixed, [torch.randn(4, 3).to(device)], layers=["0", "1"])


@pytest.mark.parametrize(
    "kind",
    [bnlab.nn.BatchNorm2d, bnlab.nn.GhostBatchNorm2d, bnlab.nn.BatchRenorm2d, nn.SyncBatchNorm],
)
def test_other_classes_get_the_same_statistics(kind, device):
    model, batches = network().to(device), images(4, 4, 3)
    bnlab.recalibrate(model, batches)
    expected = [buffer.clone() for buffer in model.buffers() if buffer.dim()]
    model[1], model[5] = (
        kind(channels, ghost_size=2).to(device) if "Ghost" in kind.__name__ else kind(channels).to(device)
        for channels in (6, 4)
    )
    bnlab.recalibrate(model, batches)
    buffers = [buffer for layer in (model[1], model[5]) for buffer in (layer.running_mean, layer.running_var)]
    if kind is bnlab.nn.GhostBatchNorm2d:  # what comes behind it is normalised part by part
        buffers, expected = buffers[:2], expected[:2]
    for left, right in zip(buffers, expected, strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_what_lies_behind_the_last_layer_runs_only_once(device):
    runs = []

    class Head(nn.Module):
        def forward(self, x):
            runs.append(x.shape)
            return x

    model = nn.Sequential(network(), Head()).to(device)
    bnlab.recalibrate(model, images(4, 4, 4))
    assert len(runs) == 1


class Counting:
    """A loader that counts how many batches are fetched, in all its iterations."""

    def __init__(self, batches):
        self.batches, self.fetched = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.fetched += 1
            yield batch


def test_a_standard_error_stops_early_and_the_receipt_says_where(device):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 1.0, 9.0, 1.0]).to(device)
    many = Counting(
        [(scale * torch.randn(64, 4, generator=generator).to(device), torch.arange(64) % 5) for _ in range(200)]
    )
    model = nn.Sequential(nn.BatchNorm1d(4)).to(device)
    receipt = bnlab.recalibrate(model, many, standard_error=0.03)
    used = int(receipt.changes.notes[0].split()[1])
    assert 14 < used == many.fetched < 40
    (error,) = (m.value for m in receipt.changes.measurements if m.what == "standard error")
    assert 0.02 < error <= 0.03
    assert re.fullmatch(
        rf"from {used} batches, {used * 64:,} samples: the pass stops at a standard error of 0\.0\d+ std, 0\.03 std "
        r"wanted \(largest for the (mean|variance) of channel \d in 0\)",
        receipt.changes.notes[0],
    )


def test_the_standard_error_counts_images_and_not_positions(device):
    """All positions of an image are the same, so that 64 values per channel are one observation."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 2, 1, 1, generator=generator).expand(8, 2, 8, 8).to(device) for _ in range(400)]
    model = nn.BatchNorm2d(2).to(device)
    receipt = bnlab.recalibrate(model, data, standard_error=0.05)
    used = int(receipt.changes.notes[0].split()[1])
    assert used > 40  # 20 x 20 images are 50 batches; counted by position, 8 batches would do


def test_layerwise_reads_for_each_layer_what_it_needs(device):
    """The second layer has heavy tails, and needs more batches than the first."""

    class Cubed(nn.Module):
        def forward(self, x):
            return x**3

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), Cubed(), nn.BatchNorm1d(4)).to(device).double()
    data = Counting([torch.randn(64, 4, generator=generator, dtype=torch.float64).to(device) for _ in range(600)])
    receipt = bnlab.recalibrate(model, data, standard_error=0.05, layerwise=True)
    few, many = (int(number) for number in re.findall(r"\d+", receipt.changes.notes[1]))
    assert receipt.changes.notes[1] == f"one pass for each layer, over {few} to {many} batches"
    assert 8 <= few < 20 < many < 600
    assert receipt.changes.notes[0].startswith(f"from {many} batches")
    assert "in 2)" in receipt.changes.notes[0]
    assert data.fetched <= few + 2 * many


@pytest.mark.parametrize("layerwise", [True, False])
def test_data_that_end_first_are_reported_and_all_used(layerwise, device):
    model, batches = network().to(device), images(4, 4, 4)
    expected = truth(model, batches)
    with pytest.warns(BnlabWarning, match="at most standard_error=0.001 before they end, got") as caught:
        receipt = bnlab.recalibrate(model, batches, standard_error=0.001, layerwise=layerwise)
    assert caught[0].filename == __file__
    assert receipt.changes.notes[0].startswith("from 3 batches, 12 samples: the data end at a standard error of ")
    assert receipt.changes.notes[0].endswith(" samples are enough")
    if not layerwise:
        assert_right(model, expected)


def test_a_limit_that_ends_first_is_reported_without_a_warning(device):
    receipt = bnlab.recalibrate(network().to(device), images(*[4] * 9), standard_error=0.001, max_batches=8)
    assert receipt.changes.notes[0].startswith("from 8 batches, 32 samples: max_batches ends the pass at a standard ")


def test_a_loader_that_is_sorted_by_class_is_read_to_the_end(device):
    """The first class alone looks as if its batches were all that there is."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (label + torch.randn(64, 4, generator=generator).to(device), torch.full((64,), label))
        for label in range(5)
        for _ in range(20)
    ]
    model = nn.BatchNorm1d(4).to(device)
    with pytest.warns(BnlabWarning, match="the labels are sorted, so that the standard error is not known. Shuffle"):
        receipt = bnlab.recalibrate(model, batches, standard_error=0.1)
    assert receipt.changes.notes[0].startswith("from 100 batches, 6,400 samples: the labels are sorted, so that")
    assert not [m for m in receipt.changes.measurements if m.what == "standard error"]
    assert_close(model.running_mean, torch.full((4,), 2.0).to(device), atol=0.1, rtol=0)
    shuffled = [batches[place] for place in torch.randperm(100, generator=generator)]
    assert "the pass stops" in bnlab.recalibrate(model, shuffled, standard_error=0.2).changes.notes[0]


def test_undo_puts_the_old_statistics_back_into_the_same_buffers(device):
    model = network().to(device)
    model(images(4)[0].to(device))
    before = snapshot(model)
    receipt = bnlab.recalibrate(model, images(4, 4))
    assert receipt.undo() is model
    assert_as_before(model, before)
    receipt.undo()
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("keep_counters", "refusal"),
    [
        (True, "running statistics of 1 must be unchanged"),
        (False, "num_batches_tracked of 1 must still be 44, got 45. Undo the later changes first."),
    ],
)
def test_undo_refuses_what_was_updated_since(keep_counters, refusal, device):
    model = network().to(device).train()
    receipt = bnlab.recalibrate(model, images(4, 4), keep_counters=keep_counters)
    model(images(4)[0].to(device))
    before = snapshot(model)
    with pytest.raises(UsageError, match=refusal):
        receipt.undo()
    assert_as_before(model, before)


def test_half_precision_buffers_are_clipped_and_noted(device):
    model = nn.BatchNorm2d(3).to(device).half()
    receipt = bnlab.recalibrate(model, [1000 * torch.randn(4, 3, 8, 8).to(device).half() for _ in range(2)])
    assert (model.running_var == torch.finfo(torch.float16).max).all()
    assert "the model itself: 3 values clipped to the range of the stored dtype" in receipt.changes.notes


def test_broken_statistics_are_mended_and_infinitely_far(device):
    model = network().to(device)
    model[1].running_var[2], model[5].running_mean[0] = -1e-3, math.nan
    receipt = bnlab.recalibrate(model, images(4, 4))
    assert torch.isfinite(model(images(4)[0].to(device))).all()
    distances = {m.layer: m.value for m in receipt.changes.measurements if m.what == "moved by"}
    assert distances == {"1": math.inf, "5": math.inf}
    assert "1 not finite" in receipt.changes.changes[1].before


def test_averaged_weights_get_statistics_of_their_own(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    averaged = AveragedModel(model)
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape).to(device)
        averaged.update_parameters(model)
    batches = [torch.randn(64, 4).to(device) for _ in range(8)]
    expected = truth(averaged, batches)
    assert max(errors(averaged, expected)) > 0.1
    bnlab.recalibrate(averaged, batches)
    assert_right(averaged, expected)


def test_a_model_without_bn_and_arguments_that_are_wrong(device):
    with pytest.raises(NoBatchNorm):
        bnlab.recalibrate(nn.Linear(2, 2).to(device), [torch.randn(4, 2).to(device)])
    for arguments, message in (
        ({"estimator": "biased"}, "estimator must be 'population' or 'within-batch', got 'biased'"),
        ({"max_batches": 0}, "max_batches must be a number of at least 1 or None, got 0"),
        ({"standard_error": 0}, "standard_error must be finite and > 0, got 0. Pass a number of standard deviations"),
        ({"standard_error": math.inf}, "standard_error must be finite and > 0, got inf"),
        ({"standard_error": math.nan}, "standard_error must be finite and > 0, got nan"),
        ({"standard_error": True}, "standard_error must be finite and > 0, got True"),
        ({"standard_error": "0.01"}, "standard_error must be finite and > 0, got '0.01'"),
        ({"forward": 3}, "forward must be callable, got int"),
        ({"layers": "1"}, "must be a list of paths"),
        ({"layers": ["9"]}, "each must lead to a BN layer, got '9'"),
    ):
        with pytest.raises(UsageError, match=message):
            bnlab.recalibrate(network().to(device), images(4), **arguments)
    with pytest.raises(UsageError, match="got a lazy layer"):
        bnlab.recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(4, 2)])


def test_a_compiled_model_is_recalibrated_and_stays_compiled(device):
    model = network().to(device)
    batches = images(4, 4)
    expected = truth(model, batches)
    compiled = torch.compile(model, backend="eager")
    assert bnlab.recalibrate(compiled, batches).model is compiled
    assert_right(model, expected)


def test_the_receipt_is_a_record_with_a_schema(device):
    import jsonschema

    from bnlab.records import Changes, json_schema

    receipt = bnlab.recalibrate(network().to(device), images(4, 4))
    data = receipt.changes.to_json()
    jsonschema.validate(data, json_schema("bnlab.receipt/1"))
    assert Changes.from_json(data) == receipt.changes
    assert "running statistics: mean 0..0, var 1..1 -> mean" in str(receipt)


def test_a_model_saved_after_recalibration_gives_the_same(device):
    model = network().to(device)
    bnlab.recalibrate(model, images(4, 4))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = network().to(device)
    again.load_state_dict(torch.load(file, weights_only=device.type != "simulated"))
    assert_close(again.eval()(torch.ones(4, 3, 12, 12).to(device)), model.eval()(torch.ones(4, 3, 12, 12).to(device)))
