"""What does not obey `model.eval()` is named with its reason, and healthy models are not."""

import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab
from bnlab.observe.passes.modes import kept_in_mode, observe_modes, set_eval_mode


class Detector(nn.Module):
    """Forgets the mode of its body."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def train(self, mode=True):
        super().train(mode)
        self.body.train()
        return self

    def forward(self, x):
        return self.body(self.stem(x))


class Switching(nn.Module):
    """Switches a layer to train mode in its forward."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn.train()(x)


class AlwaysByBatch(nn.BatchNorm2d):
    """Normalises with the batch in either mode."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


class ByFunction(nn.Module):
    """Calls the function without statistics."""

    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Standardized(nn.Conv2d):
    """Standardizes its weight with the function, as ScaledStdConv2d of timm does."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight))


class InList(nn.Module):
    """Keeps its layers in a plain container."""

    def __init__(self, layers, *, frozen=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.layers = layers
        if frozen:
            for layer in self._all():
                layer.eval()

    def _all(self):
        return self.layers.values() if isinstance(self.layers, dict) else self.layers

    def forward(self, x):
        x = self.conv(x)
        for layer in self._all():
            x = layer(x)
        return x


def test_an_overridden_train_is_named():
    modes = observe_modes(Detector(), torch.randn(4, 3, 5, 5))
    assert modes.disobedient == {
        "body.1": "is still in train mode after model.eval(), because Detector overrides train() or eval()"
    }
    assert modes.in_train_mode == ("body", "body.0", "body.1", "body.2")


def test_a_forward_that_switches_the_mode_is_named():
    model = Switching()
    assert observe_modes(model, torch.randn(4, 3, 5, 5)).disobedient == {
        "bn": "is in train mode when it runs after model.eval(): forward sets its mode"
    }


def test_the_training_flag_of_the_function_is_seen():
    modes = observe_modes(nn.Sequential(AlwaysByBatch(3), ByFunction()), torch.randn(4, 3, 5, 5))
    assert modes.disobedient == {"0": "calls batch_norm with its training flag after model.eval()"}
    assert modes.by_function == {"1": "ByFunction"}


@pytest.mark.parametrize(
    ("layers", "container"),
    [([nn.BatchNorm2d(3), nn.BatchNorm2d(3)], "list"), ({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)}, "dict")],
)
def test_layers_in_a_plain_container_are_strays(layers, container):
    strays = observe_modes(nn.Sequential(InList(layers)), torch.randn(4, 3, 5, 5)).unregistered
    assert [(stray.parent, stray.parent_kind, stray.attribute, stray.container) for stray in strays] == (
        [("0", "InList", "layers", container)] * 2
    )
    assert all(stray.training for stray in strays)


def test_layers_within_a_stray_block_are_strays_of_the_registered_parent():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    (stray,) = observe_modes(InList((block,)), torch.randn(4, 3, 5, 5)).unregistered
    assert (stray.parent, stray.attribute, stray.container) == ("", "layers", "tuple")


def test_a_frozen_teacher_in_a_list_is_in_eval_mode():
    (stray,) = observe_modes(InList([nn.BatchNorm2d(3)], frozen=True), torch.randn(4, 3, 5, 5)).unregistered
    assert not stray.training


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Standardized(3, 3, 1), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3)),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.SyncBatchNorm(3)),
        nn.Sequential(
            bnlab.nn.BatchNorm2d(3), bnlab.nn.GhostBatchNorm2d(3, ghost_size=2), bnlab.nn.FrozenBatchNorm2d(3)
        ),
        nn.Sequential(bnlab.nn.BatchRenorm2d(3), bnlab.nn.BatchNorm2d(3, activation="relu")),
    ],
    ids=["neighbours", "without statistics", "of bnlab", "renorm"],
)
def test_models_that_obey_are_silent(model):
    modes = observe_modes(model, torch.randn(4, 3, 5, 5))
    assert (modes.disobedient, modes.by_function, modes.unregistered, modes.in_train_mode) == ({}, {}, (), ())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ordinary_architectures_are_silent(name):
    model = build(name)
    shape = (4, 3, 4, 8, 8) if name == "cnn3d" else None
    modes = observe_modes(model, torch.randn(shape) if shape else images(4))
    assert not (modes.disobedient)
    assert not (modes.by_function)
    assert not (modes.unregistered)
    assert not (modes.in_train_mode)


def test_a_forward_that_raises_keeps_what_was_seen():
    modes = observe_modes(nn.Sequential(Detector(), nn.Linear(7, 1)), torch.randn(4, 3, 5, 5))
    assert list(modes.disobedient) == ["0.body.1"]


def test_a_model_is_kept_in_eval_mode_until_the_hooks_are_removed():
    model = nn.Sequential(Detector(), nn.Sequential(Switching()))
    model[1][0].bn = nn.BatchNorm2d(4)
    handles = set_eval_mode(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.eval()  # puts the body into train mode again
    model(torch.randn(4, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    for handle in handles:
        handle.remove()
    model.eval()(torch.randn(4, 3, 5, 5))
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_kept_mode_wins_over_the_mode_that_a_forward_sets():
    layer = nn.BatchNorm1d(2).eval()
    handle = kept_in_mode(layer, training=True)
    layer.eval()(torch.randn(8, 2))
    assert layer.num_batches_tracked == 1
    handle.remove()


def test_the_global_hooks_are_removed():
    before = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    observe_modes(Detector(), torch.randn(4, 3, 5, 5))
    after = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    assert after == before


def test_instance_normalization_with_running_statistics_is_no_batch_norm():
    class Instance(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x):
            return F.instance_norm(x, self.running_mean, self.running_var, use_input_stats=True)

    assert observe_modes(Instance(), torch.randn(4, 3, 5)).by_function == {}
