import copy
import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.architectures import ARCHITECTURES, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune
from torch.testing import assert_close

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.functional import batch_norm
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.executed_graph import execute
from bnlab.remedies._fold_affine import ScaleAndShift
from bnlab.remedies.fold import fold as fold_module
from bnlab.remedies.fold import layer as _fold_layer
from bnlab.remedies.fold import plan as _fold_plan
from bnlab.remedies.fold import proof as _fold_proof
from bnlab.remedies.fold.export import exported
from bnlab.remedies.fold.fold import fold
from bnlab.remedies.fold.plan import Group


def trained(model, *, seed=0):
    """Give every layer numbers of its own; some weights are negative."""
    generator = torch.Generator().manual_seed(seed)
    for layer in any_batch_norm(model).values():
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.3, 3), ("weight", -2, 2), ("bias", -1, 1)):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model


def evaluated(model, x):
    """Return the output in eval mode; the mode is put back."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        y = model.eval()(x)
    for module, mode in modes.items():
        module.training = mode
    return y


def snapshot(model):
    """Everything that must be the same afterwards, by identity and by value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {
            name: (id(tensor), tensor.detach().clone(), tensor.requires_grad, tensor.grad)
            for name, tensor in tensors.items()
        },
        {
            name: (id(m), type(m), m.training, len(m._forward_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        },
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    for name, (number, value, wants, grad) in after[0].items():
        assert (number, wants, grad) == (before[0][name][0], *before[0][name][2:]), name
        assert torch.equal(value, before[0][name][1]), name


def folded_into(receipt):
    return {change.layer: change.after.removeprefix("folded into ") for change in receipt.changes.changes}


def reasons(receipt):
    return {left.layer: left.reason for left in receipt.changes.left_alone}


def tensor_of(output):
    return output[-1] if isinstance(output, tuple) else output


def check(model, x, **changed):
    """Fold, and compare with the original in float64; return what became of each layer and why not more."""
    model = trained(model.double())
    expected = evaluated(model, x)
    before = snapshot(model)
    receipt = fold(model, x)
    assert_untouched(model, before)
    assert_close(tensor_of(receipt.model(x)), tensor_of(expected), rtol=1e-9, atol=1e-9)
    assert not any(module.training for module in receipt.model.modules())
    assert receipt.undo() is model
    assert folded_into(receipt) == changed
    return reasons(receipt)


INTO = {
    "resnet": {"layer2.0.downsample.1": "layer2.0.downsample.0", "bn1": "conv1", "layer1.1.bn2": "layer1.1.conv2"},
    "preact": {"blocks.0.bn1": "scale and shift", "blocks.1.bn2": "blocks.1.conv1", "bn": "scale and shift"},
    "mobilenet": {"features.1.conv.1.1": "features.1.conv.1.0", "features.1.conv.3": "features.1.conv.2"},
    "densenet": {"norm5": "scale and shift", "layers.0.norm2": "layers.0.conv1", "layers.1.norm1": "scale and shift"},
    "mlp": {"2": "1", "5": "4"},
    "cnn3d": {"body.1": "body.0", "body.4": "body.3", "head.1": "head.0"},
    "timm": {"bn1": "conv1", "bn2": "conv2", "bn3": "scale and shift"},
}
LIMIT = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_compute_the_same_without_bn(name, dtype):
    model, x = build(name).to(dtype), images(4).to(dtype)
    exact = evaluated(copy.deepcopy(model).double(), x.double())
    before = snapshot(model)
    receipt = fold(model, x)
    assert_untouched(model, before)
    assert folded_into(receipt).items() >= INTO[name].items()
    assert not any_batch_norm(receipt.model)
    own = (evaluated(model, x).double() - exact).abs().max()
    error = (receipt.model(x).double() - exact).abs().max()
    assert error <= 3 * own + LIMIT[dtype] / 10 * exact.abs().max()
    assert all(measured.value <= LIMIT[dtype] for measured in receipt.changes.measurements)
    groups = {change.after for change in receipt.changes.changes if change.after != "scale and shift"}
    affine = [change for change in receipt.changes.changes if change.after == "scale and shift"]
    assert len(receipt.changes.measurements) == len(groups) + len(affine) + 2


def test_names_stay_and_the_receipt_says_what_became_of_them():
    model = build("timm")
    receipt = fold(model, images(4))
    assert [name for name, _ in receipt.model.named_children()] == [name for name, _ in model.named_children()]
    assert [type(getattr(receipt.model, name)) for name in ("bn1", "bn2")] == [nn.ReLU, nn.ReLU]
    assert isinstance(receipt.model.bn3, nn.Sequential)
    text = "\n".join(line for line in str(receipt).splitlines() if "largest error" not in line)
    assert text == (
        "fold: 3 layers changed, output kept\n"
        "  batch norm: tests.architectures.BatchNormAct2d -> folded into conv1 (bn1)\n"
        "  batch norm: tests.architectures.BatchNormReLU -> folded into conv2 (bn2)\n"
        "  batch norm: tests.architectures.BatchNormAct2d -> scale and shift (bn3)\n"
        "  left alone: not folded: it is fed by the BN layer bn2, no convolution or linear layer; it has an activation "
        "(bn3)\n"
        "  read from one run: other paths through forward are seen only where the random inputs take them"
    )
    record = receipt.changes
    assert (record.action, record.safety.value) == ("fold", "exact")
    assert [measured.layer for measured in record.measurements] == ["conv1 + bn1", "conv2 + bn2", "bn3", None, None]
    assert {(m.what, m.unit) for m in record.measurements[:3]} == {("largest error", "of the largest output")}
    assert [m.what for m in record.measurements[3:]] == [
        "largest error on the example",
        "largest error on 2 random inputs",
    ]
    assert type(record).from_json(record.to_json()) == record


def test_modes_hooks_and_random_numbers_of_the_original_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval(), nn.Dropout())
    model.register_forward_hook(lambda *_: None)
    before, x = snapshot(model), images(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    folded = fold(model, x).model
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert_untouched(model, before)
    assert not folded.training
    for tensor in folded.parameters():
        assert all(tensor.data_ptr() != own.data_ptr() for own in model.parameters())


SPATIAL = {0: (), 1: (7,), 2: (6, 5), 3: (4, 5, 4)}
CONVOLUTIONS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@st.composite
def linear_layers(draw):
    """Any layer that BN can go into, its number of inputs and outputs, and its input without batch dimension."""
    spatial, groups, bias = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if spatial == 0:
        return nn.Linear(inputs, outputs, bias=bias), inputs, outputs, spatial
    transposed = draw(st.booleans())
    options = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2)), "groups": groups, "bias": bias}
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if spatial == 3 and options["padding_mode"] == "reflect":
            options["padding_mode"] = "zeros"
    kind = CONVOLUTIONS[spatial, transposed]
    return (
        kind(inputs, outputs, draw(st.integers(1, 2)), padding=draw(st.integers(0, 1)), **options),
        inputs,
        outputs,
        spatial,
    )


def norm_for(draw, channels, spatial):
    affine = draw(st.booleans())
    kind = draw(st.sampled_from([NORMS[spatial], getattr(bnlab.nn, NORMS[spatial].__name__), nn.SyncBatchNorm]))
    return kind(channels, eps=draw(st.sampled_from([1e-5, 1e-3])), affine=affine)


def formula(norm, x):
    return batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bn_goes_into_whatever_feeds_it(data):
    layer, inputs, outputs, spatial = data.draw(linear_layers())
    norm = norm_for(data.draw, outputs, spatial)
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    model = trained(nn.Sequential(layer, norm)).to(dtype).eval()
    x = torch.randn(2, inputs, *SPATIAL[spatial], dtype=dtype)
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        expected = formula(wide[1], wide[0](x.double()))
        receipt = fold(model, x)
        assert folded_into(receipt) == {"1": "0"}
        assert type(receipt.model[1]) is nn.Identity
        assert_close(receipt.model(x).double(), expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bn_goes_into_what_it_feeds_only_where_no_zeros_are_padded(data):
    layer, inputs, _, spatial = data.draw(linear_layers())
    norm = norm_for(data.draw, inputs, spatial)
    model = trained(nn.Sequential(norm, layer)).double().eval()
    x = torch.randn(2, inputs, *SPATIAL[spatial], dtype=torch.float64)
    pads = any(getattr(layer, "padding", ())) and layer.padding_mode == "zeros"
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    with torch.no_grad():
        expected = layer(formula(norm, x))
        receipt = fold(model, x)
        assert folded_into(receipt) == {"0": "scale and shift" if pads or transposed else "1"}
        assert_close(receipt.model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "kernel", "into"), [("valid", 3, "1"), ("same", 1, "1"), ("same", 3, "scale and shift")]
)
def test_padding_by_name(padding, kernel, into):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, kernel, padding=padding))
    check(model, images(2).double(), **{"0": into})


def test_a_layer_between_two_convolutions_and_both_sides_of_one():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    check(model, images(2).double(), **{"0": "1", "2": "1", "3": "1"})


def test_layouts_requires_grad_and_dtypes_stay():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = fold(model, images(2)).model
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert isinstance(folded[0].bias, nn.Parameter)
    assert folded[2].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_beside_float32_statistics(dtype):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), bnlab.nn.BatchNorm2d(4), nn.ReLU(), bnlab.nn.BatchNorm2d(4))).to(
        dtype
    )
    assert model[1].running_var.dtype == torch.float32
    x = images(2).to(dtype)
    receipt = fold(model, x)
    assert folded_into(receipt) == {"1": "0", "3": "scale and shift"}
    assert {tensor.dtype for tensor in receipt.model.parameters()} == {dtype}
    assert receipt.model(x).dtype == dtype
    exact = evaluated(copy.deepcopy(model).double(), x.double())
    assert (receipt.model(x).double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


# What others get wrong: research/peers.md, 1C.


class Shared(nn.Module):
    """torch.fx's fuse: one convolution, two BN layers (pytorch#104593)."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x))))


def test_a_shared_convolution():
    why = check(Shared(), images(2).double(), bn1="scale and shift", bn2="scale and shift")
    assert "conv runs 2 times in one forward pass" in why["bn1"]


def test_a_linear_layer_whose_outputs_are_not_the_channels():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    why = check(model, x, **{"1": "scale and shift"})
    assert why["1"] == (
        "not folded: dimension 1 of (4, 5, 5) is not the output channels of 0; "
        "dimension 1 of (4, 5, 5) is not the input channels of 2"
    )
    check(model, torch.randn(4, 6, dtype=torch.float64), **{"1": "0"})


def test_an_unbatched_convolution_whose_outputs_are_not_the_channels():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm1d(5))
    check(model, torch.randn(3, 7, 9, dtype=torch.float64), **{"1": "scale and shift"})


def test_across_a_relu():
    why = check(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), images(2).double(), **{"2": "scale and shift"}
    )
    assert why["2"].startswith("not folded: it is fed by relu, no convolution or linear layer")


class Crossed(nn.Module):
    """mmcv's fuse_conv_bn pairs in the order of registration."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.c1(x)) - self.bn1(self.c2(x))


def test_registered_in_another_order():
    assert check(Crossed(), images(2).double(), bn1="c2", bn2="c1") == {}


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1, bias=False), nn.Linear(16, 4, bias=False)])
def test_affine_false_and_bias_false(layer):
    norm = nn.BatchNorm2d(4, affine=False) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(4, affine=False)
    x = images(2) if isinstance(layer, nn.Conv2d) else torch.randn(3, 16)
    check(nn.Sequential(layer, norm), x.double(), **{"1": "0"})


def test_a_grouped_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, 2, groups=2), nn.BatchNorm2d(4))
    check(model, torch.randn(2, 6, 5, 5, dtype=torch.float64), **{"1": "0"})


def test_a_variance_of_zero_in_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-8)).half()
    model[1].running_var[2] = 0.0  # eps is 0 in float16
    x = 1e-3 * images(2).half()
    receipt = fold(model, x)
    assert folded_into(receipt) == {"1": "0"}
    assert_close(receipt.model(x), evaluated(model, x), rtol=1e-2, atol=30)
    assert receipt.model[0].weight[2].abs().max() > 100
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-12)).half()
    model[1].running_var[2] = 0.0
    with torch.no_grad():
        model[0].weight[2] = 1.0
    receipt = fold(model, 0 * images(2).half())
    assert reasons(receipt) == {"1": "the weight of 0 with it in it is not finite in float16"}
    assert type(receipt.model[1]) is nn.BatchNorm2d
    assert torch.equal(receipt.model[0].weight, model[0].weight)
    model[1].eps = 0.0
    assert reasons(fold(model, images(2).half())) == {"1": "running_var + eps is 0: its scale is infinite"}


# What must stay apart.


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


class OutputUsed(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * y


class OutputReturned(Pair):
    def forward(self, x):
        y = self.conv(x)
        return ({"features": y}, self.bn(y))


class OutputKept(Pair):
    def forward(self, x):
        self.seen = self.conv(x)
        return self.bn(self.seen)


class InANamespace(Pair):
    def forward(self, x):
        y = self.conv(x)
        return SimpleNamespace(features=y), self.bn(y)


class Collected(Pair):
    collection = []  # noqa: RUF012

    def forward(self, x):
        self.collection.append(self.conv(x))
        return self.bn(self.collection[-1])


class WeightUsed(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


class WeightReturned(Pair):
    def forward(self, x):
        return self.conv.weight, self.bn(self.conv(x))


class WeightDataUsed(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.data.sum()


class BiasUsed(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.bias.sum()


class Tied(Pair):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.bn(self.conv(x))


class ChangedInPlace(Pair):
    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.bn(y)


class ChangedInAView(Pair):
    def forward(self, x):
        y = self.conv(x)
        y[:, 0].zero_()
        return self.bn(y)


class RunTwice(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(self.conv(x + 1))


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input).abs()


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def with_producer(conv):
    model = nn.Sequential()
    model.conv, model.bn = conv, nn.BatchNorm2d(4)
    return model


def hooked(model, name, kind="register_forward_hook"):
    getattr(model.get_submodule(name), kind)(lambda *_: None)
    return model


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.bn = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.inner(x))


APART = {
    "output used": (OutputUsed, "the output of conv is used elsewhere too"),
    "output returned": (OutputReturned, "the output of conv is used elsewhere too"),
    "output kept": (OutputKept, "the output of conv is used elsewhere too"),
    "output in a namespace": (InANamespace, "the output of conv is used elsewhere too"),
    "output collected": (Collected, "the output of conv is used elsewhere too"),
    "weight used": (WeightUsed, "the weight of conv is used elsewhere too"),
    "weight returned": (WeightReturned, "the weight of conv is used elsewhere too"),
    "weight.data used": (WeightDataUsed, "the weight of conv is used elsewhere too"),
    "bias used": (BiasUsed, "the bias of conv is used elsewhere too"),
    "weight tied": (Tied, "the weight of conv is used elsewhere too"),
    "changed in place": (ChangedInPlace, "it is fed by mul, no convolution or linear layer"),
    "changed in a view": (ChangedInAView, "the output of conv is used elsewhere too"),
    "run twice": (RunTwice, "it runs 2 times in one forward pass"),
    "own forward": (lambda: with_producer(OwnForward(3, 4, 3)), "it is fed by abs, no convolution or linear layer"),
    "own weight": (lambda: with_producer(Standardised(3, 4, 3)), "conv has a _conv_forward of its own"),
    "parametrized": (
        lambda: with_producer(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
        "the weight of conv is parametrized",
    ),
    "pruned": (
        lambda: with_producer(prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)),
        "hooks look at conv, or make its weight",
    ),
    "hook on the convolution": (
        lambda: hooked(with_producer(nn.Conv2d(3, 4, 3)), "conv"),
        "hooks look at conv, or make its weight",
    ),
    "hook around the convolution": (lambda: hooked(Nested(), "inner"), "the output of inner.0 is used elsewhere too"),
}


@pytest.mark.parametrize("case", APART)
def test_a_pair_stays_apart(case):
    make, reason = APART[case]
    why = check(make(), images(2).double(), bn="scale and shift")
    assert why["bn"].removeprefix("not folded: ").partition(";")[0] == reason


def stays(model, x=None):
    """Return why the only layer stays BN."""
    model = model.double()
    receipt = fold(model, images(2).double() if x is None else x)
    assert receipt.changes.changes == ()
    assert len(any_batch_norm(receipt.model)) == 1
    (reason,) = reasons(receipt).values()
    return reason


def of(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def spoilt(name, value):
    model = of(nn.BatchNorm2d(4))
    getattr(model[1], name).data[1] = value
    return model


class Residual(Pair):
    def __init__(self, *, by_name):
        super().__init__()
        self.bn, self.by_name = bnlab.nn.BatchNorm2d(4), by_name

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y, residual=x[:, :1, 1:-1, 1:-1]) if self.by_name else self.bn(y, x[:, :1, 1:-1, 1:-1])


class ReadsBN(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight.sum()


class Unused(Pair):
    def forward(self, x):
        return self.conv(x)


def test_a_layer_stays():
    assert stays(spoilt("running_var", -1e-3)) == "running_var is negative in 1 of 4 channels: recalibrate it first"
    assert stays(spoilt("running_mean", float("nan"))) == (
        "running_mean is not finite in 1 of 4 channels: recalibrate it first"
    )
    assert stays(spoilt("weight", float("inf"))) == "weight is not finite in 1 of 4 channels"
    assert stays(hooked(of(nn.BatchNorm2d(4)), "1")) == "hooks look at it"
    for by_name in (True, False):
        assert stays(Residual(by_name=by_name)) == "it is called with more than its input, such as a residual or a mask"
    assert stays(ReadsBN()) == "its weight is used outside it"
    assert stays(Unused()) == "it did not run on the example"


def test_a_layer_without_running_statistics_stays():
    model = of(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(NoBatchNorm):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3)), images(2))
    receipt = fold(model, images(2))
    assert reasons(receipt) == {"1": "it has no running statistics: its output in eval mode depends on the batch"}


class ResidualElsewhere(nn.Module):
    """The output of a convolution goes into another BN layer by name, which no graph of functions shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), bnlab.nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.bn(y), residual=y)


def test_an_output_that_is_a_residual_elsewhere():
    why = check(ResidualElsewhere(), images(2).double(), bn="scale and shift")
    assert why["bn"].startswith("not folded: the output of conv is used elsewhere too")


# Layers that are not torch's.


class FrozenBatchNorm2d(nn.Module):
    """torchvision's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        w, b, rv, rm = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class HiddenEps(FrozenBatchNorm2d):
    """DETR's: the eps is in the code, and not even the usual one."""

    def __init__(self, channels, eps):
        super().__init__(channels, eps)
        del self.eps
        self.hidden = eps

    def __getattr__(self, name):
        if name == "eps":
            raise AttributeError(name)
        return super().__getattr__(name)

    def forward(self, x):
        plain = FrozenBatchNorm2d(x.size(1), self.hidden).to(x)
        plain.load_state_dict(self.state_dict())
        return plain(x)


class InPlaceABN(FrozenBatchNorm2d):
    """inplace_abn's: abs(weight) + eps, and a leaky ReLU; it overwrites its input."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight.abs() + self.eps, self.bias, eps=self.eps)
        return x.copy_(F.leaky_relu(y, 0.01))


class FrozenAct(FrozenBatchNorm2d):
    """timm's, with an activation that bnlab's layers do not have."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Hardshrink(0.1)

    def forward(self, x):
        return self.act(super().forward(x))


def test_frozen_layers_of_detection_libraries():
    x = images(2).double()
    check(of(FrozenBatchNorm2d(4)), x, **{"1": "0"})
    check(of(FrozenBatchNorm2d(4, eps=0.0)), x, **{"1": "0"})
    check(of(HiddenEps(4, 1e-5)), x, **{"1": "0"})
    check(of(bnlab.nn.FrozenBatchNorm2d(4)), x, **{"1": "0"})
    wrong = "its output in eval mode is not scale*x + shift of its running statistics (eps 1e-05)"
    assert stays(trained(of(HiddenEps(4, 1.1e-5)))) == wrong
    assert stays(trained(of(InPlaceABN(4)))) == wrong
    positive = trained(of(InPlaceABN(4)))
    positive[1].weight.abs_()
    assert stays(positive) == wrong


def test_activations_stay_where_they_were():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenAct(4), nn.Conv2d(4, 4, 1)).double())
    receipt = fold(model, images(2).double())
    assert type(receipt.model[1]) is nn.Hardshrink
    for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh"):
        model = of(bnlab.nn.BatchNorm2d(4, activation=name))
        check(model, images(2).double(), **{"1": "0"})


class Clamped(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).clamp(-1e3, 1e3)


class ByBatch(nn.BatchNorm2d):
    def forward(self, input):
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


def test_subclasses_that_do_something_else_stay():
    wrong = "its output in eval mode is not scale*x + shift of its running statistics (eps 1e-05)"
    assert stays(of(Clamped(4))) == wrong
    assert stays(of(ByBatch(4))) == wrong


# The proof.


def test_a_forgotten_eps_is_caught(monkeypatch):
    monkeypatch.setattr(
        _fold_layer, "scale_and_shift", lambda m, v, w, b, eps: bnlab.functional.scale_and_shift(m, v, w, b, 0.0)
    )
    assert "is not scale*x + shift" in stays(trained(of(nn.BatchNorm2d(4, eps=1e-3))))
    monkeypatch.setattr(_fold_layer, "_activation", lambda *_: None)
    assert "with it folded, 0 + 1 differs by" in stays(trained(of(nn.BatchNorm2d(4, eps=1e-3))))
    monkeypatch.setattr(fold_module, "errors_of_pairs", lambda model, example, pairs: dict.fromkeys(pairs, 0.0))
    with pytest.raises(
        UsageError, match=r"^fold: the folded model must give the output .* within 1e-09 .*, got \d\.\de-0"
    ):
        fold(trained(of(nn.BatchNorm2d(4, eps=1e-3))).double(), images(2).double())


def test_folding_across_a_relu_is_caught(monkeypatch):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))).double()

    def misled(plan, hosts, path, *_):
        plan.groups["0"] = Group("0", after=[path])

    monkeypatch.setattr(_fold_plan, "_place", misled)
    receipt = fold(model, images(2).double())
    assert receipt.changes.changes == ()
    assert torch.equal(receipt.model[0].weight, model[0].weight)
    monkeypatch.setattr(fold_module, "errors_of_pairs", lambda model, example, pairs: dict.fromkeys(pairs, 0.0))
    with pytest.raises(UsageError, match=r"^fold: the folded model must give the output"):
        fold(model, images(2).double())


class Secret(nn.Module):
    """The convolution's output is read where no graph of torch's functions shows it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + float(y.numpy().sum())


class Branching(Pair):
    """Another path for other inputs."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if float(x.flatten()[0]) == 0.5 else y


@pytest.mark.parametrize("kind", [Secret, Branching])
def test_what_the_graph_does_not_show_is_refused_as_a_whole(kind):
    model, x = trained(kind()), images(2)
    x.view(-1)[0] = 0.5
    before = snapshot(model)
    with pytest.raises(UsageError, match=r"^fold: the folded model must give the output of the original within 1e-04"):
        fold(model, x)
    assert_untouched(model, before)


def test_tolerance():
    model = trained(of(nn.BatchNorm2d(4)))
    receipt = fold(model, images(2), tolerance=1e-12)
    assert reasons(receipt)["1"].startswith("with it folded, 0 + 1 differs by ")
    assert reasons(receipt)["1"].endswith(" of the largest output, above 1e-12")
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"^fold: tolerance must be above 0 and finite, got "):
            fold(model, images(2), tolerance=wrong)


def test_a_measured_error_is_the_largest_over_the_largest():
    a = torch.tensor([[4.0, float("nan")], [1.0, -2.0]])
    assert _fold_proof.relative_error(a, a + 0.5) == 0.125
    assert _fold_proof.relative_error(a, a.nan_to_num()) == float("inf")
    assert _fold_proof.relative_error(a[:0], a[:0]) == 0
    assert _fold_proof.relative_error(a, a.double()) == float("inf")


def test_random_inputs_look_like_the_example():
    example = {"x": 5 + 2 * torch.randn(64, 3, 8, 8), "mask": torch.ones(64), "ids": torch.arange(64), "flag": True}
    first, second = _fold_proof.variants(example)
    assert first["x"].mean() == pytest.approx(5, abs=0.1)
    assert first["x"].std() == pytest.approx(2, abs=0.1)
    assert torch.equal(first["mask"], example["mask"])
    assert not torch.equal(first["ids"], example["ids"])
    assert torch.equal(first["ids"].sort().values, example["ids"])
    assert first["flag"] is True
    assert not torch.equal(first["x"], second["x"])
    (zeros, _) = _fold_proof.variants(torch.zeros(32, 32))
    assert zeros.std() == pytest.approx(1, abs=0.1)


class Strict(Pair):
    def forward(self, x):
        if x.amin() < 0:
            raise ValueError("images lie in [0, 1]")
        return self.bn(self.conv(x))


def test_random_inputs_that_the_original_refuses_are_left_out():
    receipt = fold(trained(Strict()), images(2).sigmoid())
    assert [m.what for m in receipt.changes.measurements] == ["largest error", "largest error on the example"]


class Drawing(Pair):
    def forward(self, x):
        return F.dropout(self.bn(self.conv(x)), 0.5, training=True) * random.random() * np.random.rand()


def test_a_model_that_draws_in_eval_mode():
    assert folded_into(fold(trained(Drawing()), images(2))) == {"bn": "conv"}


class Listed(nn.Module):
    """Modules in a plain list beside their names."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.steps = [self.conv, self.bn]
        self.again = nn.ModuleList([self.bn, self.conv])

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_modules_with_several_names():
    assert check(Listed(), images(2).double(), bn="conv") == {}


class Dicts(Pair):
    def forward(self, *, image, index):
        return {"y": SimpleNamespace(), "z": [self.bn(input=self.conv(input=image)), index]}


def test_batches_and_outputs_of_other_forms():
    model = trained(Dicts())
    receipt = fold(model, {"image": images(4), "index": torch.arange(4)})
    assert folded_into(receipt) == {"bn": "conv"}
    assert folded_into(fold(trained(of(nn.BatchNorm2d(4))), (images(2), torch.arange(2)))) == {"1": "0"}


class Labels(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3)).argmax(1)


class Nothing(Pair):
    def forward(self, x):
        self.bn(self.conv(x))


def test_what_a_model_returns():
    assert folded_into(fold(trained(Labels()), images(4))) == {"bn": "conv"}
    with pytest.raises(UsageError, match=r"^fold: the model must return tensors to prove that .*, got none\.$"):
        fold(trained(Nothing()), images(4))


class NoCopy(Pair):
    def forward(self, x):
        return self.bn(self.conv(x))

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle\n'lock' object")


def test_what_cannot_be_folded_at_all():
    x, model = images(2), of(nn.BatchNorm2d(4))
    with pytest.raises(
        UsageError, match=r"^model: it must be one that can be copied, got TypeError: cannot pickle 'lock'"
    ):
        fold(trained(NoCopy()), x)
    with pytest.raises(UsageError, match=r"^model: forward must run on the example, got RuntimeError: "):
        fold(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(
        UsageError, match=r"^fold: the model must not be compiled yet, got a compiled module\. Fold it "
    ):
        fold(torch.compile(model, backend="eager"), x)
    with pytest.raises(UsageError, match=r"^fold: the model must not be compiled yet, got a compiled module at 0\."):
        fold(nn.Sequential(torch.compile(model, backend="eager")), x)
    with pytest.raises(UsageError, match=r"^fold: the model must know its shapes, got a lazy layer\. Run one batch"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), x)
    with pytest.raises(UsageError, match=r"^fold: the model must have values, got tensors on the meta device"):
        fold(copy.deepcopy(model).to("meta"), x.to("meta"))
    with pytest.raises(UsageError, match=r"^model: it must be a torch.nn.Module, got list"):
        fold([model], x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_models_are_refused():
    scripted = torch.jit.trace(of(nn.BatchNorm2d(4)).eval(), images(2))
    with pytest.raises(UsageError, match=r"^fold: the model must not be scripted, got a "):
        fold(scripted, images(2))


def test_the_model_may_be_one_layer():
    model = trained(nn.BatchNorm2d(3).double())
    x = images(2).double()
    receipt = fold(model, x)
    assert isinstance(receipt.model, ScaleAndShift)
    assert_close(receipt.model(x), evaluated(model, x))


def test_folding_again_finds_nothing():
    folded = fold(build("resnet"), images(2)).model
    with pytest.raises(NoBatchNorm):
        fold(folded, images(2))


def test_the_graph_leaves_no_global_hook():
    execute(build("mlp"), images(2))
    assert not nn.modules.module._has_any_global_hook()


# Files.


def loaded(data):
    return torch.export.load(io.BytesIO(data)).module()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_computes_the_same_for_batches_of_any_size(batch):
    model, x = fold(build("resnet"), images(batch)).model, images(batch)
    data, note = exported(model, x)
    assert note == "the batch may have any size"
    for other in (x, images(5), images(1)):
        assert_close(loaded(data)(other), model(other))


class Fixed(Pair):
    def forward(self, image, scale):
        return self.bn(self.conv(image)).reshape(2, -1) * scale


def test_a_file_for_one_size_only_says_so():
    batch = {"image": images(2), "scale": torch.tensor(2.0)}
    model = fold(trained(Fixed()), batch).model
    data, note = exported(model, batch)
    assert note.startswith("the batch must have 2 samples, for torch.export says: ")
    assert_close(loaded(data)(**batch), model(**batch))


class NotExportable(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) if float(x.flatten()[0]) > -1e9 else x


def test_a_model_that_torch_cannot_export():
    model = fold(trained(NotExportable()), images(2)).model
    with pytest.raises(UsageError, match=r"^model: torch.export must take it, got \w+: "):
        exported(model, images(2))
