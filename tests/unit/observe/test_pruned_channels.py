"""The pruned channels of a network are those whose values are the same for any input, as two inputs show."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize, prune

from bnlab.observe.discover import any_batch_norm
from bnlab.observe.evidence import Pruned
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.pruned_channels import pruned_inputs, zero_outputs

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (2, 6, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), (2, 6, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 8, 3, bias=False), (2, 6, 5)),
    "transposed and grouped": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def same_for_any_input(function, shape):
    """Return which channels of the output do not change between two random inputs. They are the oracle."""
    with torch.no_grad():
        one, other = function(torch.randn(shape)), function(torch.randn(shape))
    return (one == other).transpose(0, 1).flatten(1).all(1).numpy()


def without_filters(module, outputs):
    """Set the weights of output channels to 0. The gradient of an output shows which weights it has."""
    for channel in outputs:
        module.zero_grad()
        x = torch.randn(*([2, 6] + [5] * (module.weight.dim() - 2)))
        module(x)[:, channel].square().sum().backward()
        with torch.no_grad():
            module.weight[module.weight.grad != 0] = 0
    module.zero_grad()
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_output_channels_without_weights_are_those_that_no_input_changes(name):
    make, shape = LAYERS[name]
    module = without_filters(make(), (1, 5, 6))
    expected = same_for_any_input(module, shape)
    np.testing.assert_array_equal(np.flatnonzero(expected), (1, 5, 6))
    np.testing.assert_array_equal(zero_outputs(module), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_output_channels_that_read_only_pruned_channels(name):
    make, shape = LAYERS[name]
    module = without_filters(make(), (0,))
    inputs = np.array([False, True, True, False, False, True])
    with torch.no_grad():
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            module.weight[3, [0, 3, 4]] = 0
        elif "transposed" in name:
            module.weight[[0, 3, 4], 3] = 0

    def held_constant(x):
        x[:, inputs] = 0.7
        return module(x)

    expected = same_for_any_input(held_constant, shape)
    assert 1 <= expected.sum() < len(expected)
    np.testing.assert_array_equal(zero_outputs(module, inputs), expected)


def test_the_axes_of_a_transposed_convolution_are_not_exchanged():
    """A wrong answer that the oracle catches: axis 0 of its weights is that of the inputs."""
    module = nn.ConvTranspose2d(6, 6, 3)
    with torch.no_grad():
        module.weight[:, 2] = 0
        module.weight[4] = 0  # an input that nothing reads does not make an output constant
    np.testing.assert_array_equal(np.flatnonzero(zero_outputs(module)), [2])
    np.testing.assert_array_equal(zero_outputs(module), same_for_any_input(module, (2, 6, 5, 5)))


def test_non_finite_weights_are_not_pruned():
    module = nn.Linear(3, 3)
    with torch.no_grad():
        module.weight[0] = float("nan")
        module.weight[1] = -0.0
    assert zero_outputs(module).tolist() == [False, True, False]


def pruned_in(model, x):
    layers = any_batch_norm(model)
    with torch.no_grad():
        graph = execute(model.eval(), x, layers.values())
    return pruned_inputs(dict(model.named_modules()), graph, layers)


def constant_inputs(model, one, other):
    """Return the channels of every BN layer whose input is the same in every call on two batches."""
    seen = {name: [] for name in any_batch_norm(model)}
    handles = [
        layer.register_forward_pre_hook(lambda module, x, name=name: seen[name].append(x[0]))
        for name, layer in any_batch_norm(model).items()
    ]
    with torch.no_grad():
        model.eval()(one)
        model(other)
    for handle in handles:
        handle.remove()
    constant = {}
    for name, inputs in seen.items():
        calls = len(inputs) // 2
        equal = [
            (a == b).transpose(0, 1).flatten(1).all(1) for a, b in zip(inputs[:calls], inputs[calls:], strict=True)
        ]
        channels = torch.stack(equal).all(0).nonzero().flatten().tolist() if equal else []
        if channels:
            constant[name] = tuple(channels)
    return constant


def without_dead_units(model):
    """Keep the output of BN within the linear part of ReLU6, so that no channel is constant for another reason."""
    for layer in any_batch_norm(model).values():
        if layer.affine:
            nn.init.constant_(layer.weight, 0.1)
            nn.init.constant_(layer.bias, 3.0)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_filters_pruned_in_every_architecture(name):
    model = without_dead_units(build(name).double())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.weight.size(0) > 3:
            prune.ln_structured(module, "weight", 0.3, n=1, dim=int(isinstance(module, nn.ConvTranspose2d)))
    pruned = pruned_in(model, images(4).double())
    one, other = images(4).double(), torch.randn_like(images(4)).double()
    expected = constant_inputs(model, one, other)
    assert {path: channels.channels for path, channels in pruned.items()} == expected


def test_no_architecture_has_pruned_channels_before():
    assert not any(pruned_in(build(name), images(4)) for name in ARCHITECTURES)


class Branches(nn.Module):
    """Two convolutions whose outputs are added, and concatenated, before BN."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.after_sum, self.after_cat = nn.BatchNorm2d(4), nn.BatchNorm2d(12)
        self.after_product, self.after_roll = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        both = torch.cat([left, x.sum(1, keepdim=True).expand(-1, 4, -1, -1), F.max_pool2d(F.relu(right), 1)], dim=-3)
        return (
            self.after_sum(left + right),
            self.after_cat(both),
            self.after_product(left * right),
            self.after_roll(left.roll(1, dims=1)),
        )


def test_a_sum_needs_both_summands_and_a_concatenation_shifts_the_channels():
    model = Branches()
    with torch.no_grad():
        model.left.weight[[0, 2]] = 0
        model.right.weight[[2, 3]] = 0
    x = torch.randn(2, 3, 5, 5)
    assert pruned_in(model, x) == {
        "after_sum": Pruned((2,), ("left", "right")),
        "after_cat": Pruned((0, 2, 10, 11), ("left", "right")),
    }


def test_a_channel_that_only_one_call_of_a_shared_layer_sees_pruned_is_not_pruned():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.bn = nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(self.first(x)) + self.bn(self.second(x))

    model = Shared()
    with torch.no_grad():
        model.first.weight[[1, 2]] = 0
    assert pruned_in(model, torch.randn(5, 3)) == {}
    with torch.no_grad():
        model.second.weight[[2, 3]] = 0
    assert pruned_in(model, torch.randn(5, 3)) == {"bn": Pruned((2,), ("first", "second"))}


def test_a_depthwise_convolution_behind_a_pruned_filter_names_that_filter():
    model = nn.Sequential(
        OrderedDict(
            wide=nn.Conv2d(3, 4, 1),
            bn1=nn.BatchNorm2d(4),
            relu=nn.ReLU6(),
            depth=nn.Conv2d(4, 4, 3, padding=1, groups=4),
            bn2=nn.BatchNorm2d(4),
        )
    )
    with torch.no_grad():
        model.wide.weight[1] = 0
        model.depth.weight[3] = 0
    assert pruned_in(model, torch.randn(2, 3, 6, 6)) == {
        "bn1": Pruned((1,), ("wide",)),
        "bn2": Pruned((1, 3), ("depth", "wide")),
    }


def test_weights_of_a_parametrization_are_those_that_run():
    class Masked(nn.Module):
        def forward(self, weight):
            return weight * torch.tensor([[1.0], [0.0], [1.0]])

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    parametrize.register_parametrization(model[0], "weight", Masked())
    assert pruned_in(model, torch.randn(5, 4)) == {"1": Pruned((1,), ("0",))}


def test_a_linear_layer_on_another_axis_prunes_nothing():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(model[0].weight)
    assert pruned_in(model, torch.randn(3, 4, 6)) == {}


def test_weights_of_another_class_are_left_alone():
    class Quantised(nn.Parameter):
        def __ne__(self, other):
            raise NotImplementedError

        __hash__ = nn.Parameter.__hash__

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].weight = Quantised(torch.zeros(3, 4))
    assert pruned_in(model, torch.randn(5, 4)) == {}
