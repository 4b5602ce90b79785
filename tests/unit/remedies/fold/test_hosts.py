import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.architectures import images
from tests.unit.remedies.fold.samples import Pair, check, folded_into, hooked, trained
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune
from torch.testing import assert_close

import bnlab
from bnlab.functional import batch_norm
from bnlab.remedies.fold.fold import fold

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
@given(data=st.data())
def test_bn_goes_into_whatever_feeds_it(data, device):
    layer, inputs, outputs, spatial = data.draw(linear_layers())
    norm = norm_for(data.draw, outputs, spatial)
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    model = trained(nn.Sequential(layer, norm)).to(device).to(dtype).eval()
    x = torch.randn(2, inputs, *SPATIAL[spatial], dtype=dtype).to(device)
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        expected = formula(wide[1], wide[0](x.double()))
        receipt = fold(model, x)
        assert folded_into(receipt) == {"1": "0"}
        assert type(receipt.model[1]) is nn.Identity
        assert_close(receipt.model(x).double(), expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bn_goes_into_what_it_feeds_only_where_no_zeros_are_padded(data, device):
    layer, inputs, _, spatial = data.draw(linear_layers())
    norm = norm_for(data.draw, inputs, spatial)
    model = trained(nn.Sequential(norm, layer)).to(device).double().eval()
    x = torch.randn(2, inputs, *SPATIAL[spatial], dtype=torch.float64).to(device)
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
def test_padding_by_name(padding, kernel, into, device):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, kernel, padding=padding)).to(device)
    check(model, images(2).to(device).double(), **{"0": into})


class Shared(nn.Module):
    """torch.fx's fuse: one convolution, two BN layers (pytorch#104593)."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x))))


def test_a_shared_convolution(device):
    why = check(Shared().to(device), images(2).to(device).double(), bn1="scale and shift", bn2="scale and shift")
    assert "conv runs 2 times in one forward pass" in why["bn1"]


def test_a_linear_layer_whose_outputs_are_not_the_channels(device):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(device)
    x = torch.randn(4, 5, 6, dtype=torch.float64).to(device)
    why = check(model, x, **{"1": "scale and shift"})
    assert why["1"] == (
        "not folded: dimension 1 of (4, 5, 5) is not the output channels of 0; "
        "dimension 1 of (4, 5, 5) is not the input channels of 2"
    )
    check(model, torch.randn(4, 6, dtype=torch.float64).to(device), **{"1": "0"})


def test_an_unbatched_convolution_whose_outputs_are_not_the_channels(device):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm1d(5)).to(device)
    check(model, torch.randn(3, 7, 9, dtype=torch.float64).to(device), **{"1": "scale and shift"})


def test_across_a_relu(device):
    why = check(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).to(device),
        images(2).to(device).double(),
        **{"2": "scale and shift"},
    )
    assert why["2"].startswith("not folded: it is fed by relu, which is not a convolution or linear layer")


class Crossed(nn.Module):
    """mmcv's fuse_conv_bn pairs in the order of registration."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.c1(x)) - self.bn1(self.c2(x))


def test_registered_in_another_order(device):
    assert check(Crossed().to(device), images(2).to(device).double(), bn1="c2", bn2="c1") == {}


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
    "changed in place": (ChangedInPlace, "it is fed by mul, which is not a convolution or linear layer"),
    "changed in a view": (ChangedInAView, "the output of conv is used elsewhere too"),
    "run twice": (RunTwice, "it runs 2 times in one forward pass"),
    "own forward": (
        lambda: with_producer(OwnForward(3, 4, 3)),
        "it is fed by abs, which is not a convolution or linear layer",
    ),
    "own weight": (lambda: with_producer(Standardised(3, 4, 3)), "conv has a _conv_forward of its own"),
    "parametrized": (
        lambda: with_producer(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
        "the weight of conv is parametrized",
    ),
    "pruned": (
        lambda: with_producer(prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)),
        "hooks read conv, or compute its weight",
    ),
    "hook on the convolution": (
        lambda: hooked(with_producer(nn.Conv2d(3, 4, 3)), "conv"),
        "hooks read conv, or compute its weight",
    ),
    "hook around the convolution": (lambda: hooked(Nested(), "inner"), "the output of inner.0 is used elsewhere too"),
}


@pytest.mark.parametrize("case", APART)
def test_a_pair_stays_apart(case, device):
    make, reason = APART[case]
    why = check(make().to(device), images(2).to(device).double(), bn="scale and shift")
    assert why["bn"].removeprefix("not folded: ").partition(";")[0] == reason


class ResidualElsewhere(nn.Module):
    """The output of a convolution goes into another BN layer by name, which no graph of functions shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), bnlab.nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.bn(y), residual=y)


def test_an_output_that_is_a_residual_elsewhere(device):
    why = check(ResidualElsewhere().to(device), images(2).to(device).double(), bn="scale and shift")
    assert why["bn"].startswith("not folded: the output of conv is used elsewhere too")
