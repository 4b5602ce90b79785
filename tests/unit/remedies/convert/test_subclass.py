import copy
import pickle

import pytest
import torch
from tests.architectures import BatchNormAct2d, BatchNormReLU, build, images
from tests.unit.remedies.convert.samples import Dropping, Scaled, assert_same, outputs, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError
from bnlab.remedies.convert.subclass import Beyond, beyond_batch_norm, own_behaviour


def test_a_class_with_an_activation_keeps_it_both_ways():
    model, x = build("timm"), images(4)
    expected = copy.deepcopy(model).eval()(x)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert [model.bn1.activation, model.bn2.activation, model.bn3.activation] == ["relu", "relu", "silu"]
    assert_close(copy.deepcopy(model).eval()(x), expected)
    assert_close(pickle.loads(pickle.dumps(model)).eval()(x), expected)
    assert "activation: - -> silu (bn3)" in str(receipt)
    bnlab.convert(model, nn.BatchNorm2d)
    assert [type(m) for m in (model.bn1, model.bn2)] == [BatchNormAct2d, BatchNormReLU]
    assert torch.equal(model.eval()(x), expected)


class AlwaysEval(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class BiasedStatistics(nn.BatchNorm2d):
    def forward(self, input):
        y = super().forward(input)
        if self.training:
            self.running_var.mul_(0.999)
        return y


class LeakyReLU2(nn.BatchNorm2d):
    def forward(self, input):
        return nn.functional.leaky_relu(super().forward(input), 0.2)


class WithArgument(nn.BatchNorm2d):
    def forward(self, input, scale=None):
        y = super().forward(input)
        return y if scale is None else y * scale


class Detached(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input.detach())


class WithoutGrad(nn.BatchNorm2d):
    def forward(self, input):
        with torch.no_grad():
            return super().forward(input)


class InFloat(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input.float()) if input.dtype == torch.float16 else super().forward(input)


class BySize(nn.BatchNorm1d):
    def forward(self, input):
        y = super().forward(input)
        return 2 * y if input.dim() == 2 else y


class ByGrad(nn.BatchNorm2d):
    def forward(self, input):
        y = super().forward(input)
        return y.clamp(-1, 1) if torch.is_grad_enabled() else y


class Remembering(nn.BatchNorm2d):
    def forward(self, input):
        self.last = input
        return super().forward(input)


class WithSlope(nn.BatchNorm2d):
    slope = 0.01

    def forward(self, input):
        return nn.functional.leaky_relu(super().forward(input), self.slope)


def patched():
    layer = nn.BatchNorm2d(3)
    layer._check_input_dim = lambda x: None
    return layer


class FromTheBase(_BatchNorm):
    def _check_input_dim(self, input):
        pass


class OnlyNamed(nn.BatchNorm2d):
    """A class of its own, with nothing of its own."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)

    def extra_repr(self):
        return "mine"


def overridden():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


NO_MORE = "do nothing beyond BN and an activation, got test_convert"
OTHERS = [
    (WithArgument(3), f"{NO_MORE}.WithArgument with a forward with more arguments than the input."),
    (Detached(3), f"{NO_MORE}.Detached with a forward that reads input.detach."),
    (WithoutGrad(3), f"{NO_MORE}.WithoutGrad with a forward that uses no_grad."),
    (InFloat(3), f"{NO_MORE}.InFloat with a forward that depends on input.dtype == torch.float16."),
    (BySize(3), f"{NO_MORE}.BySize with a forward that depends on input.dim() == 2."),
    (ByGrad(3), f"{NO_MORE}.ByGrad with a forward that depends on torch.is_grad_enabled()."),
    (Remembering(3), f"{NO_MORE}.Remembering with a forward that sets self.last."),
    (WithSlope(3), f"{NO_MORE}.WithSlope with slope of its own."),
    (patched(), "do nothing beyond BN and an activation, got torch.nn.BatchNorm2d with _check_input_dim of its own."),
    (Scaled(3), "do nothing beyond BN and an activation, got test_convert.Scaled with a forward of its own."),
    (Dropping(3), "do nothing beyond BN and an activation, got test_convert.Dropping with a forward of its own."),
    (AlwaysEval(3), "do nothing beyond BN and an activation, got test_convert.AlwaysEval with train of its own."),
    (BiasedStatistics(3), "do nothing beyond BN and an activation, got test_convert.BiasedStatistics with a forward"),
    (LeakyReLU2(3), "do nothing beyond BN and an activation, got test_convert.LeakyReLU2 with a forward of its own."),
    (FromTheBase(3), "derive from a BN layer of torch.nn or bnlab.nn, got test_convert.FromTheBase."),
    (overridden(), "do nothing beyond BN and an activation, got torch.nn.BatchNorm2d with forward of its own."),
    (nn.LazyBatchNorm2d(), "know its number of channels, got a lazy layer. Run one batch first."),
    (
        parametrizations.weight_norm(nn.BatchNorm2d(3), "weight", dim=0),
        "have weight and bias as plain parameters, got a parametrization. Remove it first.",
    ),
    (
        nn.BatchNorm2d(3, momentum=1.5),
        "fit the arguments of bnlab.nn.BatchNorm2d, got the error 'BatchNorm2d: momentum",
    ),
]


@pytest.mark.parametrize(("layer", "message"), OTHERS, ids=lambda value: type(value).__name__)
def test_what_would_be_lost_is_refused_and_nothing_is_changed(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UsageError) as err:
        bnlab.convert(model, bnlab.nn.BatchNorm2d)
    text = str(err.value).replace(f"{type(layer).__module__}.", "test_convert.")
    assert text.startswith(f"1.0: layer must {message}")
    assert [type(m) for m in model.modules()] == kinds
    bnlab.convert(model, bnlab.nn.BatchNorm2d, layers=["0"])


def test_a_subclass_with_nothing_of_its_own_is_plain_bn():
    model = nn.Sequential(OnlyNamed(3))
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert (type(model[0]), model[0].momentum) == (bnlab.nn.BatchNorm2d, 0.01)
    bnlab.convert(model, nn.BatchNorm2d)
    assert type(model[0]) is OnlyNamed


def test_an_activation_has_no_place_in_torchs_layer():
    model = nn.Sequential(bnlab.nn.BatchNorm2d(3, activation="relu"))
    for to in (nn.BatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm):
        with pytest.raises(
            UsageError, match=r"^0: layer must have no activation to become torch.nn.\w+, got 'relu'. Put"
        ):
            bnlab.convert(model, to)
    assert bnlab.convert(model, bnlab.nn.BatchRenorm2d).model[0].activation == "relu"


class Mish(nn.BatchNorm2d):
    """BN, a dropout that is off, and an activation that bnlab does not have."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.Mish(inplace=True)

    def forward(self, input):
        return self.act(self.drop(super().forward(input)))


def test_submodules_that_are_no_activation_of_bnlab_are_kept_and_run():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Mish(4)).double(), images(4).double()
    before, original = snapshot(model), copy.deepcopy(model)
    expected = outputs(model, x)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert "followed_by: - -> ('act',) (1)" in str(receipt)
    assert isinstance(model[1], bnlab.nn.BatchNorm2d)
    assert_close(outputs(model, x), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(outputs(other, x), expected)
    with pytest.raises(
        UsageError, match=r"^1: layer must run no submodule after BN to become torch.nn.GroupNorm, got act"
    ):
        bnlab.convert(model, nn.GroupNorm)
    bnlab.freeze(model)
    assert_close(pickle.loads(pickle.dumps(model)).train()(x), original.eval()(x))
    bnlab.unfreeze(model)
    assert_close(outputs(model, x), expected)
    fused = bnlab.convert(model, bnlab.nn.BatchRenorm2d, fuse=True, example=x)
    assert [left.reason for left in fused.changes.left_alone] == ["it has an activation already"]
    fused.undo()
    receipt.undo()
    assert_same(snapshot(model), before)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    bnlab.convert(model, nn.BatchNorm2d)
    assert type(model[1]) is Mish
    assert torch.equal(model.eval()(x), original.eval()(x))


class Wrapped(nn.BatchNorm2d):
    """A forward behind a decorator, which the source code does not show."""

    @torch.autocast("cpu", enabled=False)
    def forward(self, input):
        return nn.functional.relu(super().forward(input))


class WrappedScale(nn.BatchNorm2d):
    @torch.autocast("cpu", enabled=False)
    def forward(self, input):
        return 2 * nn.functional.relu(super().forward(input))


def test_a_forward_that_cannot_be_read_is_proven_by_runs():
    model = nn.Sequential(Wrapped(3))
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model[0].activation == "relu"
    bnlab.convert(model, nn.BatchNorm2d)
    bnlab.freeze(model)
    assert model[0].activation == "relu"
    for remedy in (bnlab.freeze, lambda model: bnlab.convert(model, bnlab.nn.BatchNorm2d)):
        with pytest.raises(UsageError, match="WrappedScale with a forward of its own, which gives other outputs in"):
            remedy(nn.Sequential(WrappedScale(3)))


def test_an_answer_is_for_one_class_and_its_settings():
    layers = [Mish(4), Mish(4), Mish(4)]
    layers[1].act = nn.SiLU()
    layers[2].act = nn.Dropout(0.5)
    assert [beyond_batch_norm(layer, nn.BatchNorm2d, 2) for layer in layers] == [
        Beyond(modules=("act",)), Beyond("silu"), Beyond(modules=("act",))
    ]  # fmt: skip


def timm_layers():
    from tests import torchvision_operators  # noqa: F401 - declares what timm imports

    norm_act = pytest.importorskip("timm.layers.norm_act")
    layer = norm_act.BatchNormAct2d
    return [
        (layer(4), Beyond("relu")),
        (layer(4, apply_act=False), Beyond()),
        (layer(4, act_layer="hard_swish"), Beyond("hardswish")),
        (layer(4, act_layer="leaky_relu", act_kwargs={"negative_slope": 1e-3}), Beyond(modules=("act",))),
        (layer(4, act_layer="gelu_tanh"), Beyond(modules=("act",))),
        (layer(4, drop_layer=nn.Dropout), Beyond(modules=("drop", "act"))),
        (layer(4, momentum=None), Beyond("relu")),
        (norm_act.convert_sync_batchnorm(layer(4)), Beyond("relu")),
    ]


def test_the_layers_of_timm():
    for layer, expected in timm_layers():
        base = nn.SyncBatchNorm if isinstance(layer, nn.SyncBatchNorm) else nn.BatchNorm2d
        assert beyond_batch_norm(layer, base, 2) == expected
        model, x = nn.Sequential(nn.Conv2d(3, 4, 1), layer).double(), images(4).double()
        before, results = snapshot(model), outputs(model, x)
        receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
        assert_close(outputs(model, x), results)
        receipt.undo()
        assert_same(snapshot(model), before)
        frozen = bnlab.freeze(model)
        frozen.undo()
        assert_same(snapshot(model), before)


def test_a_layer_of_timm_that_does_more_is_refused():
    from tests import torchvision_operators  # noqa: F401 - declares what timm imports

    norm_act = pytest.importorskip("timm.layers.norm_act")

    class Clamped(norm_act.BatchNormAct2d):
        def forward(self, x):
            return super().forward(x).clamp(max=50.0)

    with pytest.raises(UsageError, match="Clamped with a forward of its own"):
        bnlab.convert(nn.Sequential(Clamped(4)), bnlab.nn.BatchNorm2d)


class Repeats(nn.BatchNorm2d):
    dump_patches = False  # as every module has it


class Changes(nn.BatchNorm2d):
    dump_patches = True


def test_an_attribute_with_the_value_of_the_base_is_no_behaviour():
    assert own_behaviour(Repeats, nn.BatchNorm2d) is None
    assert own_behaviour(Changes, nn.BatchNorm2d) == "dump_patches"
