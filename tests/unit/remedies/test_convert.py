import copy
import functools
import pickle

import pytest
import torch
from tests.architectures import ARCHITECTURES, BatchNormAct2d, BatchNormReLU, build, images
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.records import Changes, Safety, json_schema

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def snapshot(model):
    """Everything about a model that a conversion must keep."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "tensors": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "objects": [id(module) for module in model.modules()],
        "attributes": [
            {key: value for key, value in vars(module).items() if not key.startswith("_")} for module in model.modules()
        ],
        "containers": [
            {key: [*vars(module)[key]] for key in ("_buffers", "_parameters")} for module in model.modules()
        ],
        "requires_grad": {key: value.requires_grad for key, value in model.named_parameters()},
        "not saved": [sorted(module._non_persistent_buffers_set) for module in model.modules()],
    }


def assert_same(before, after):
    assert_close(before["state"], after["state"], rtol=0, atol=0)
    assert {**before, "state": None} == {**after, "state": None}


def outputs(model, x):
    """Output, gradients and buffers of a copy, in either mode."""
    found = []
    for training in (True, False):
        copied = copy.deepcopy(model).train(training)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = copied(leaf)
        y.cos().sum().backward()
        found.append((y, leaf.grad, [p.grad for p in copied.parameters()], copied.state_dict()))
    return found


@architectures
def test_there_and_back_is_bit_exact(name):
    model, x = build(name).train(), images(8)
    before, expected = snapshot(model), outputs(model, x)
    there = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert there.model is model
    assert all(isinstance(m, bnlab.nn.BatchNorm1d.__base__) for m in model.modules() if isinstance(m, _BatchNorm))
    assert_close(outputs(model, x), expected, rtol=2e-3, atol=1e-4)
    back = bnlab.convert(model, nn.BatchNorm2d)
    assert_same(snapshot(model), before)
    for left, right in zip(outputs(model, x), expected, strict=True):
        assert_close(left, right, rtol=0, atol=0)
    assert (there.changes.safety, back.changes.safety) == (Safety.EXACT, Safety.EXACT)


@architectures
def test_converted_networks_compute_the_same_in_float64(name):
    model, x = build(name).double(), images(8).double()
    expected = outputs(model, x)
    bnlab.convert(model, bnlab.nn.BatchNorm1d)
    assert_close(outputs(model, x), expected, rtol=1e-8, atol=1e-9)


TARGETS = {
    "ours": bnlab.nn.BatchNorm2d,
    "frozen": bnlab.nn.FrozenBatchNorm2d,
    "ghost": functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=2),
    "renorm": bnlab.nn.BatchRenorm2d,
    "sync": nn.SyncBatchNorm,
    "group": functools.partial(nn.GroupNorm, 2),
    "instance": nn.InstanceNorm2d,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["resnet", "cnn3d"])
def test_undo_gives_the_original_back(target, name):
    model = build(name)
    before = snapshot(model)
    receipt = bnlab.convert(model, TARGETS[target])
    assert [type(m) for m in model.modules()] != [kind for _, kind in before["types"]]
    assert receipt.undo() is model
    assert_same(snapshot(model), before)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_undo_keeps_what_was_trained_meanwhile():
    model, x = build("resnet"), images(8)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.double().eval()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    receipt.undo()
    assert_close(model.state_dict(), trained, rtol=0, atol=0)
    assert not model.bn1.training
    assert type(model.bn1) is nn.BatchNorm2d


def test_an_optimizer_made_before_goes_on():
    model = build("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    model(images(4)).sum().backward()
    before = model.bn1.weight.clone()
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)


def test_everything_about_a_layer_is_kept():
    seen = []
    layer = nn.BatchNorm2d(4, eps=1e-3, momentum=None).half().eval()
    layer.weight.requires_grad_(False)
    layer.tag = "mine"
    handle = layer.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    model = nn.Sequential(layer, nn.ReLU())
    model.alias = [layer]
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model.alias[0] is model[0] is layer
    assert type(layer) is bnlab.nn.BatchNorm2d
    assert (layer.eps, layer.momentum, layer.training, layer.tag) == (1e-3, None, False, "mine")
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean, layer.running_var)} == {torch.float16}
    model(torch.randn(2, 4, 3, 3).half())
    assert seen == [bnlab.nn.BatchNorm2d]
    handle.remove()
    model(torch.randn(2, 4, 3, 3).half())
    assert len(seen) == 1


def test_a_layer_with_two_names_is_converted_once():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model["a"] is model["b"] is shared
    assert [change.layer for change in receipt.changes.changes] == ["a"]


def test_the_model_itself_may_be_the_layer():
    layer = nn.BatchNorm1d(4)
    receipt = bnlab.convert(layer, bnlab.nn.BatchNorm1d)
    assert receipt.model is layer
    assert type(layer) is bnlab.nn.BatchNorm1d


def test_only_the_chosen_layers():
    model = build("resnet")
    bnlab.convert(model, bnlab.nn.BatchNorm2d, layers=["bn1", "layer2.*"])
    ours = {name for name, m in model.named_modules() if isinstance(m, bnlab.nn.BatchNorm2d)}
    assert ours == {"bn1", *(f"layer2.{n}" for n in ("0.bn1", "0.bn2", "0.downsample.1", "1.bn1", "1.bn2"))}
    for layers, message in (
        (["layer3.*"], "layers: each must lead to a BN layer, got 'layer3.*'. Did you mean 'layer2.1.bn2'?"),
        (["bn2"], "layers: each must lead to a BN layer, got 'bn2'. Did you mean 'bn1'?"),
        ("bn1", "layers: they must be a list of paths, got the text 'bn1'. Write ['bn1']."),
    ):
        with pytest.raises(UsageError) as err:
            bnlab.convert(model, nn.BatchNorm2d, layers=layers)
        assert str(err.value) == message


@pytest.mark.parametrize("training", [True, False])
def test_frozen_networks_are_eval_mode_and_thaw(training):
    model, x = build("resnet"), images(4)
    model.bn1.weight.requires_grad_(False)
    expected = copy.deepcopy(model).eval()(x)
    receipt = bnlab.convert(model, bnlab.nn.FrozenBatchNorm2d)
    assert_close(model.train(training)(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(model.get_submodule(c.layer).bias.requires_grad for c in receipt.changes.changes)
    assert receipt.changes.safety is Safety.BEHAVIOUR
    bnlab.convert(model, nn.BatchNorm2d)
    assert [model.bn1.weight.requires_grad, model.bn1.bias.requires_grad] == [False, True]
    assert model.bn1.training is training


def test_group_and_instance_norm_take_over_weight_and_bias():
    for to, kind in ((nn.GroupNorm, nn.GroupNorm), (nn.InstanceNorm1d, nn.InstanceNorm2d)):
        model, x = build("resnet"), images(4)
        weight = model.bn1.weight
        receipt = bnlab.convert(model, to)
        assert type(model.bn1) is kind
        assert model.bn1.weight is weight
        assert model.bn1.eps == 1e-5
        assert not [key for key in model.state_dict() if "running" in key or "tracked" in key]
        assert torch.isfinite(model(x)).all()
        assert "running statistics: kept -> dropped" in str(receipt)
    assert bnlab.convert(nn.BatchNorm2d(48), nn.GroupNorm).model.num_groups == 24
    assert bnlab.convert(nn.BatchNorm2d(64), functools.partial(nn.GroupNorm, num_groups=16)).model.num_groups == 16
    layer = nn.BatchNorm2d(6)
    fresh = nn.GroupNorm(3, 6)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(bnlab.convert(layer, functools.partial(nn.GroupNorm, 3)).model(x), fresh(x))


def test_options_reach_every_layer_and_change_it_later():
    model = build("resnet")
    bnlab.convert(model, functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=4))
    assert model.bn1.ghost_size == 4
    receipt = bnlab.convert(model, functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=2))
    assert model.bn1.ghost_size == 2
    receipt.undo()
    assert model.bn1.ghost_size == 4
    bnlab.convert(model, functools.partial(bnlab.nn.BatchRenorm2d, r_max=2.0))
    assert (model.bn1.r_max, model.bn1.momentum) == (2.0, 0.1)
    assert not hasattr(model.bn1, "ghost_size")


def test_sync_batch_norm_comes_back():
    x = torch.randn(4, 3, 16, 16)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("cnn3d"))
    model.train()
    with pytest.raises(UsageError) as err:
        bnlab.convert(nn.Sequential(nn.SyncBatchNorm(4)), nn.InstanceNorm2d, layers=["1"])
    assert "got '1'" in str(err.value)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, example=x)
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)]
    assert kinds == ["BatchNorm3d", "BatchNorm3d", "BatchNorm1d"]
    assert torch.isfinite(model(x)).all()
    bnlab.convert(model, nn.SyncBatchNorm)
    bnlab.convert(model, nn.BatchNorm3d)
    assert {type(m) for m in model.modules() if isinstance(m, _BatchNorm)} == {nn.BatchNorm3d}


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


class Scaled(nn.BatchNorm2d):
    def forward(self, input):
        return 1.001 * super().forward(input)


class Dropping(nn.BatchNorm2d):
    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.01, self.training)


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
    (Detached(3), f"{NO_MORE}.Detached with a forward that looks at input.detach."),
    (WithoutGrad(3), f"{NO_MORE}.WithoutGrad with a forward with a with statement."),
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
    (nn.BatchNorm2d(3, momentum=1.5), "be able to become bnlab.nn.BatchNorm2d, got the refusal 'BatchNorm2d: momentum"),
]


@pytest.mark.parametrize(("layer", "message"), OTHERS, ids=lambda value: type(value).__name__)
def test_what_would_be_lost_is_refused_and_nothing_is_changed(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UsageError) as err:
        bnlab.convert(model, bnlab.nn.BatchNorm2d)
    text = str(err.value).replace(f"{__name__}.", "test_convert.")
    assert text.startswith(f"1.0: layer must {message}")
    assert [type(m) for m in model.modules()] == kinds
    bnlab.convert(model, bnlab.nn.BatchNorm2d, layers=["0"])


def test_every_refused_layer_is_named():
    model = nn.Sequential(Scaled(3), nn.BatchNorm2d(3), Dropping(3))
    with pytest.raises(UsageError, match=r"^0: layer must .* Refused too: 2\.$"):
        bnlab.convert(model, bnlab.nn.BatchNorm2d)


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


def test_settings_torch_does_not_know_are_listed():
    receipt = bnlab.convert(bnlab.nn.BatchNorm2d(3, nonfinite="propagate"), nn.BatchNorm2d)
    assert "nonfinite: propagate -> -" in str(receipt)
    assert bnlab.convert(bnlab.nn.BatchNorm2d(3), nn.BatchNorm2d).changes.changes[0].layer == ""


def test_a_frozen_layer_needs_statistics():
    with pytest.raises(UsageError, match="keep running statistics to be frozen"):
        bnlab.convert(nn.BatchNorm2d(3, track_running_stats=False), bnlab.nn.FrozenBatchNorm2d)
    with pytest.raises(UsageError, match="BatchRenorm2d: track_running_stats must be True"):
        bnlab.convert(nn.BatchNorm2d(3, track_running_stats=False), bnlab.nn.BatchRenorm2d)
    model = nn.BatchNorm2d(3, track_running_stats=False)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model.running_mean is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"to": nn.LayerNorm},
            (
                "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm, "
                "got <class 'torch.nn.modules.normalization.LayerNorm'>."
            ),
        ),
        ({"to": Scaled}, "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm"),
        ({"to": "bnlab"}, "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm"),
        (
            {"to": functools.partial(bnlab.nn.BatchNorm2d, eps=1e-3)},
            "convert: to must not say what every layer keeps, got eps. Leave it out.",
        ),
        (
            {"to": functools.partial(bnlab.nn.BatchNorm2d, 64)},
            "convert: to must not say what every layer keeps, got 64. Leave it out.",
        ),
        (
            {"to": functools.partial(nn.GroupNorm, 5)},
            (
                "0: layer must be able to become torch.nn.GroupNorm, got the refusal "
                "'num_channels (4) must be divisible by num_groups (5)'."
            ),
        ),
        (
            {"to": bnlab.nn.BatchNorm2d, "fuse": True},
            "convert: fuse must come with an example and a layer class of bnlab.nn, got no example.",
        ),
        (
            {"to": nn.SyncBatchNorm, "fuse": True, "example": torch.ones(1)},
            "convert: fuse must come with an example and a layer class of bnlab.nn, got <class",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(UsageError) as err:
        bnlab.convert(model, **arguments)
    assert str(err.value).startswith(message)
    assert type(model[0]) is nn.BatchNorm2d


def test_models_without_bn_and_other_things():
    with pytest.raises(NoBatchNorm, match=r"^model: it must contain a BN layer, got none"):
        bnlab.convert(nn.Linear(3, 3), bnlab.nn.BatchNorm2d)
    with pytest.raises(UsageError, match=r"^model: it must be a torch"):
        bnlab.convert({}, bnlab.nn.BatchNorm2d)


def test_the_record_follows_the_schema_and_reads_back():
    jsonschema = pytest.importorskip("jsonschema")
    receipt = bnlab.convert(build("resnet"), bnlab.nn.FrozenBatchNorm2d)
    data = receipt.changes.to_json()
    jsonschema.validate(data, json_schema("bnlab.receipt/1"))
    assert Changes.from_json(data) == receipt.changes
    assert repr(receipt) == "<Receipt: convert, layers changed: 10>"
    assert "convert: 10 layers changed, behaviour changed" in receipt._repr_html_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("to", [bnlab.nn.BatchNorm2d, nn.GroupNorm])
def test_undo_after_a_change_of_dtype_gives_a_model_that_runs(dtype, to):
    model, x = build("resnet"), images(4).to(dtype)
    receipt = bnlab.convert(model, to)
    model.to(dtype)
    receipt.undo()
    assert torch.isfinite(model.eval()(x)).all()
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    bnlab.convert(model, nn.BatchNorm2d)
    assert torch.isfinite(model(x)).all()


def test_undo_keeps_settings_and_attributes_of_later():
    model = nn.Sequential(nn.BatchNorm2d(3))
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    model[0].momentum, model[0].tag = 0.3, "mine"
    receipt.undo()
    assert (model[0].momentum, model[0].tag) == (0.3, "mine")


def test_undo_of_a_parametrized_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    parametrizations.weight_norm(model[0], "weight", dim=0)
    with pytest.raises(UsageError, match="undo: every module must be as it was left"):
        receipt.undo()


def test_statistics_dtype_is_an_option_like_any_other():
    model = nn.BatchNorm2d(3)
    bnlab.convert(model, functools.partial(bnlab.nn.BatchNorm2d, statistics_dtype=torch.float64))
    assert model.running_var.dtype == torch.float64


def test_a_second_conversion_to_the_same_changes_nothing():
    model = build("resnet")
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert bnlab.convert(model, bnlab.nn.BatchNorm2d).changes.changes == ()
