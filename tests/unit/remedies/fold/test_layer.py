import pytest
import torch
from tests.architectures import images
from tests.unit.remedies.fold.samples import Pair, check, hooked, of, reasons, trained
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.discover import any_batch_norm
from bnlab.remedies.fold import fold as fold_module
from bnlab.remedies.fold import layer as _fold_layer
from bnlab.remedies.fold.fold import fold


def stays(model, x=None):
    """Return why the only layer stays BN."""
    model = model.double()
    receipt = fold(model, images(2).double() if x is None else x)
    assert receipt.changes.changes == ()
    assert len(any_batch_norm(receipt.model)) == 1
    (reason,) = reasons(receipt).values()
    return reason


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


def test_a_layer_stays(device):
    assert (
        stays(spoilt("running_var", -1e-3).to(device))
        == "running_var is negative in 1 of 4 channels: recalibrate it first"
    )
    assert stays(spoilt("running_mean", float("nan")).to(device)) == (
        "running_mean is not finite in 1 of 4 channels: recalibrate it first"
    )
    assert stays(spoilt("weight", float("inf")).to(device)) == "weight is not finite in 1 of 4 channels"
    assert stays(hooked(of(nn.BatchNorm2d(4)), "1").to(device)) == "it has hooks"
    for by_name in (True, False):
        assert (
            stays(Residual(by_name=by_name).to(device))
            == "it is called with more than its input, such as a residual or a mask"
        )
    assert stays(ReadsBN().to(device)) == "its weight is used outside it"
    assert stays(Unused().to(device)) == "it did not run on the example"


def test_a_layer_without_running_statistics_stays(device):
    model = of(nn.BatchNorm2d(4, track_running_stats=False)).to(device)
    with pytest.raises(NoBatchNorm):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3)).to(device), images(2).to(device))
    receipt = fold(model, images(2).to(device))
    assert reasons(receipt) == {"1": "it has no running statistics: its output in eval mode depends on the batch"}


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


def test_frozen_layers_of_detection_libraries(device):
    x = images(2).to(device).double()
    check(of(FrozenBatchNorm2d(4)).to(device), x, **{"1": "0"})
    check(of(FrozenBatchNorm2d(4, eps=0.0)).to(device), x, **{"1": "0"})
    check(of(HiddenEps(4, 1e-5)).to(device), x, **{"1": "0"})
    check(of(bnlab.nn.FrozenBatchNorm2d(4)).to(device), x, **{"1": "0"})
    wrong = "its output in eval mode is not scale*x + shift of its running statistics (eps 1e-05)"
    assert stays(trained(of(HiddenEps(4, 1.1e-5))).to(device)) == wrong
    assert stays(trained(of(InPlaceABN(4))).to(device)) == wrong
    positive = trained(of(InPlaceABN(4))).to(device)
    positive[1].weight.abs_()
    assert stays(positive) == wrong


def test_activations_stay_where_they_were(device):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenAct(4), nn.Conv2d(4, 4, 1)).double()).to(device)
    receipt = fold(model, images(2).to(device).double())
    assert type(receipt.model[1]) is nn.Hardshrink
    for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh"):
        model = of(bnlab.nn.BatchNorm2d(4, activation=name)).to(device)
        check(model, images(2).to(device).double(), **{"1": "0"})


class Clamped(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).clamp(-1e3, 1e3)


class Doubling(nn.BatchNorm2d):
    def forward(self, input):
        y = super().forward(input)
        return 2 * y if y.abs().max() > 5e4 else y


class ByBatch(nn.BatchNorm2d):
    def forward(self, input):
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


def test_subclasses_that_do_something_else_stay(device):
    wrong = "its output in eval mode is not scale*x + shift of its running statistics (eps 1e-05)"
    assert stays(of(Clamped(4)).to(device)) == wrong
    assert stays(of(Doubling(4)).to(device)) == wrong
    assert stays(of(ByBatch(4)).to(device)) == wrong


def test_a_forgotten_eps_is_caught(monkeypatch, device):
    monkeypatch.setattr(
        _fold_layer, "scale_and_shift", lambda m, v, w, b, eps: bnlab.functional.scale_and_shift(m, v, w, b, 0.0)
    )
    assert "is not scale*x + shift" in stays(trained(of(nn.BatchNorm2d(4, eps=1e-3))).to(device))
    monkeypatch.setattr(_fold_layer, "_activation", lambda *_: None)
    assert "when it is folded, 0 + 1 differs by" in stays(trained(of(nn.BatchNorm2d(4, eps=1e-3))).to(device))
    monkeypatch.setattr(fold_module, "errors_of_pairs", lambda model, example, pairs: dict.fromkeys(pairs, 0.0))
    with pytest.raises(
        UsageError, match=r"^fold: the folded model must give the output .* within 1e-09 .*, got \d\.\de-0"
    ):
        fold(trained(of(nn.BatchNorm2d(4, eps=1e-3))).to(device).double(), images(2).to(device).double())
