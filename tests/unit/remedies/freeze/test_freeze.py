import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.architectures import ARCHITECTURES, BatchNormAct2d, BatchNormReLU, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.records import Changes, Safety, json_schema
from bnlab.remedies.convert.conversion import Conversion
from bnlab.remedies.freeze.freeze import freeze, unfreeze

NAMES = ("normaliser", "buffers", "affine")
SWITCHES = [dict(zip(NAMES, on, strict=True)) for on in itertools.product((True, False), repeat=3) if any(on)]
switches = pytest.mark.parametrize("on", SWITCHES, ids=lambda on: "+".join(name for name in NAMES if on[name]))

SHAPES = {1: (6, 8), 2: (6, 8, 4, 4), 3: (6, 8, 2, 3, 3)}
KINDS = {
    **{f"torch{rank}d": (getattr(nn, f"BatchNorm{rank}d"), SHAPES[rank]) for rank in SHAPES},
    "sync2d": (nn.SyncBatchNorm, SHAPES[2]),
    "sync1d": (nn.SyncBatchNorm, SHAPES[1]),
    "timm": (BatchNormAct2d, SHAPES[2]),
    "relu": (BatchNormReLU, SHAPES[2]),
    **{
        f"{family}{rank}d": (functools.partial(getattr(bnlab.nn, f"{family}{rank}d"), **options), SHAPES[rank])
        for family, options in (
            ("BatchNorm", {"activation": "relu"}),
            ("GhostBatchNorm", {"ghost_size": 3}),
            ("BatchRenorm", {"r_max": 2.0}),
        )
        for rank in SHAPES
    },
}
kinds = pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS.keys())


def trained(kind):
    layer = kind(8)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(7)
    return nn.Sequential(layer)


def by_the_book(layer, x):
    """Eval mode of BN and the activation behind it, in float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        t.detach().double().view(shape) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    y = (x.double() - mean) / (var + layer.eps).sqrt() * weight + bias
    has_relu = isinstance(layer, (BatchNormAct2d, BatchNormReLU)) or getattr(layer, "activation", None)
    return F.relu(y) if has_relu else y


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def required(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def same_state(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def assert_freezes(action, kind, shape, on):
    """Whether a model is, after an action, frozen as three switches say, come train() what may."""
    original = trained(kind)
    model = copy.deepcopy(original)
    action(model)
    model.eval()
    model.train()
    layer = model[0]
    assert required(model) == dict.fromkeys(required(original), not on["affine"])
    for step in range(3):
        x = 3 + 2 * torch.randn(shape)
        before, wanted = state_of(model), by_the_book(original[0], x)
        assert_close(copy.deepcopy(model).eval()(x).double(), wanted, rtol=1e-5, atol=1e-5)
        y = model(x)
        if on["normaliser"]:
            assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(y, copy.deepcopy(original)(x))
        if on["buffers"]:
            assert same_state(state_of(model), before)
        else:
            assert layer.num_batches_tracked > 7 + step
            assert not torch.equal(layer.running_mean, before["0.running_mean"])
        with torch.no_grad():
            original[0].running_mean.copy_(layer.running_mean)
            original[0].running_var.copy_(layer.running_var)
            original[0].num_batches_tracked.copy_(layer.num_batches_tracked)


@switches
@kinds
def test_each_switch_freezes_what_it_says_and_nothing_else(kind, shape, on):
    assert_freezes(lambda model: freeze(model, **on), kind, shape, on)


def eval_mode(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def no_grad_only(model):
    model.requires_grad_(False)


def lightning(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
    model.requires_grad_(False)


def momentum_zero(model):
    model[0].momentum = 0.0


def nothing_kept(model):
    model[0].running_mean = model[0].running_var = None


@pytest.mark.parametrize(
    ("wrong", "on"),
    [
        (eval_mode, (True, True, False)),
        (eval_mode, (False, True, False)),
        (no_grad_only, (False, True, True)),
        (lightning, (True, True, True)),
        (momentum_zero, (False, True, False)),
        (nothing_kept, (False, True, False)),
        (lambda model: freeze(model, affine=False), (True, True, True)),
        (lambda model: freeze(model), (True, False, True)),
    ],
)
def test_what_others_do_is_caught(wrong, on):
    with pytest.raises((AssertionError, AttributeError)):
        assert_freezes(wrong, nn.BatchNorm2d, SHAPES[2], dict(zip(NAMES, on, strict=True)))


def everything(model):
    """All that unfreezing must give back, and the identity of what must stay."""
    modules = list(model.modules())
    return {
        "types": [type(module) for module in modules],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "tensors": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "attributes": [{k: comparable(v) for k, v in vars(m).items() if not k.startswith("_")} for m in modules],
        "limits": [[m.r_max, m.d_max, *m.renorm_limits.tolist()] for m in modules if hasattr(m, "r_max")],
        "names": [[sorted(m._parameters), sorted(m._buffers), sorted(m._modules)] for m in modules],
        "required": required(model),
    }


def comparable(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def assert_same(left, right):
    assert same_state(left["state"], right["state"])
    assert {**left, "state": None} == {**right, "state": None}


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@switches
@kinds
def test_unfreeze_gives_everything_back_also_on_copies(kind, shape, on, device):
    model = trained(kind).to(device)
    model[0].momentum, model[0].tag = 0.3, "mine"
    model[0].bias.requires_grad_(False)
    before, objects = everything(model), [id(module) for module in model.modules()]
    receipt = freeze(model, **on)
    assert_same({**before, "types": 0, "attributes": 0, "limits": 0, "required": 0, "names": 0}, {
        **everything(model), "types": 0, "attributes": 0, "limits": 0, "required": 0, "names": 0
    })  # fmt: skip
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded(model)]
    assert unfreeze(model).model is model
    assert_same(everything(model), before)
    assert [id(module) for module in model.modules()] == objects
    for other in copies:
        x = torch.randn(shape).to(device)
        assert torch.equal(other.train()(x), copy.deepcopy(other).train()(x)) or not on["buffers"]
        unfreeze(other)
        assert [type(m) for m in other.modules()] == before["types"]
        assert "frozen_from" not in vars(other[0])
        assert required(other) == before["required"]
        assert {**everything(other)["attributes"][1], "nothing": 0} == {**before["attributes"][1], "nothing": 0}
    with pytest.raises(UsageError, match=r"^undo: every module must be unchanged"):
        receipt.undo()
    again = freeze(model, **on)
    again.undo()
    assert_same(everything(model), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_frozen_network_is_its_eval_mode_and_comes_back(name, device):
    model, x = build(name).to(device).train(), images(4).to(device)
    before = everything(model)
    wanted = copy.deepcopy(model).eval()(x)
    trained_output = copy.deepcopy(model)(x) if name != "mobilenet" else None
    freeze(model)
    frozen = {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    assert all(issubclass(kind, FrozenBatchNorm) for kind in frozen)
    assert_close(copy.deepcopy(model).eval()(x), wanted, rtol=1e-4, atol=1e-5)
    if trained_output is not None:
        assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(AssertionError):
            assert_close(trained_output, wanted, rtol=1e-4, atol=1e-5)
    unfreeze(model)
    assert_same(everything(model), before)


def test_bnlabs_layers_keep_the_bits_of_eval_mode(device):
    for kind in (bnlab.nn.BatchNorm2d, bnlab.nn.GhostBatchNorm2d, bnlab.nn.BatchRenorm2d):
        model, x = trained(kind).to(device), torch.randn(SHAPES[2]).to(device)
        wanted = model.eval()(x)
        freeze(model)
        assert torch.equal(model(x), wanted)
        assert torch.equal(model.train()(x), wanted)


@switches
def test_torchs_layers_keep_eval_mode_to_rounding(on, device):
    model, x = trained(nn.BatchNorm2d).to(device), torch.randn(SHAPES[2]).to(device)
    wanted = by_the_book(model[0], x)
    torchs = model.eval()(x)
    freeze(model, **on)
    y = model(x)
    if not on["normaliser"]:
        assert torch.equal(y, torchs)
    eps = torch.finfo(torch.float32).eps
    error = (y.double() - wanted).abs().max()
    assert error <= 2 * eps * wanted.abs().max()


@switches
def test_state_dicts_load_both_ways(on, device):
    plain, frozen = trained(nn.BatchNorm2d).to(device), trained(nn.BatchNorm2d).to(device)
    freeze(frozen, **on)
    assert [*plain.state_dict()] == [*frozen.state_dict()]
    frozen.load_state_dict(plain.state_dict())
    assert same_state(state_of(frozen), state_of(plain))
    other = trained(nn.BatchNorm2d).to(device)
    other.load_state_dict(frozen.state_dict())
    assert same_state(state_of(other), state_of(frozen))


@switches
@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_it_survives_a_change_of_dtype(on, move, device):
    model, reference = trained(nn.BatchNorm2d).to(device), trained(nn.BatchNorm2d).to(device)
    reference.load_state_dict(model.state_dict())
    freeze(model, **on)
    move(model).train()
    x = torch.randn(SHAPES[2]).to(device).to(model[0].weight.dtype)
    before = state_of(model)
    model(x)
    assert same_state(state_of(model), before) is on["buffers"]
    assert required(model) == dict.fromkeys(required(model), not on["affine"])
    unfreeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert {t.dtype for t in (*model.parameters(), model[0].running_var)} == {x.dtype}
    assert torch.isfinite(model.eval()(x)).all()
    if on["buffers"]:
        assert same_state(state_of(model), state_of(move(reference)))


@pytest.mark.parametrize("optimizer", [
    functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
])  # fmt: skip
@pytest.mark.parametrize("to_none", [True, False])
def test_an_optimizer_made_before_leaves_frozen_parameters_alone(optimizer, to_none, device):
    model = build("resnet").to(device)
    steps = optimizer(model.parameters())

    def train():
        for _ in range(3):
            steps.zero_grad(set_to_none=to_none)
            model(images(4).to(device)).square().sum().backward()
            steps.step()

    def own(model):
        return {key: value.clone() for key, value in model.state_dict().items() if "bn" in key or "downsample.1" in key}

    train()
    before, convolution = own(model), model.conv1.weight.clone()
    freeze(model)
    train()
    assert same_state(own(model), before)
    assert not torch.equal(model.conv1.weight, convolution)
    unfreeze(model)
    train()
    after = own(model)
    assert not any(torch.equal(after[key], value) for key, value in before.items() if key.endswith(("bias", "var")))


@pytest.mark.parametrize("action", [freeze, no_grad_only])
def test_a_gradient_left_over_is_not_decayed(action, device):
    model = trained(nn.BatchNorm2d).to(device)
    steps = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(SHAPES[2]).to(device)).sum().backward()
    action(model)
    before = model[0].weight.clone()
    steps.step()
    assert torch.equal(model[0].weight, before) is (action is freeze)


def test_nothing_of_the_size_of_the_input_is_kept_for_the_backward_pass(device):
    model, x = trained(nn.BatchNorm2d).to(device), torch.randn(SHAPES[2], requires_grad=True).to(device)
    freeze(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        model(x)
    assert max(saved, default=0) <= 8


def test_freezing_again_changes_nothing(device):
    model = build("resnet").to(device)
    freeze(model)
    memory = model.bn1.frozen_from
    receipt = freeze(model)
    assert receipt.changes.changes == ()
    assert receipt.changes.safety is Safety.EXACT
    assert {left.reason for left in receipt.changes.left_alone} == {"it is in this state already"}
    assert model.bn1.frozen_from is memory


def test_a_later_call_says_all_three_switches(device):
    model = trained(nn.BatchNorm2d).to(device)
    before = everything(model)
    freeze(model)
    receipt = freeze(model, normaliser=False, affine=False)
    assert [str((c.what, c.before, c.after)) for c in receipt.changes.changes] == [
        "('class', 'bnlab.nn.FrozenBatchNorm2d', 'torch.nn.BatchNorm2d')",
        "('normaliser', 'running statistics', 'batch statistics in train mode')",
        "('affine.requires_grad', 'none', 'weight, bias')",
    ]
    receipt.undo()
    assert type(model[0]) is bnlab.nn.FrozenBatchNorm2d
    assert not any(required(model).values())
    freeze(model, buffers=False)
    assert model[0].moves_statistics
    unfreeze(model)
    assert_same(everything(model), before)


def test_what_a_switch_did_not_freeze_is_left_to_the_user(device):
    model = trained(nn.BatchNorm2d).to(device)
    freeze(model, affine=False)
    model[0].weight.requires_grad_(False)
    model[0].momentum = 0.5
    freeze(model)
    unfreeze(model)
    assert required(model) == {"0.weight": False, "0.bias": True}
    assert model[0].momentum == 0.5


def test_what_was_switched_on_by_hand_is_frozen_again(device):
    model = trained(nn.BatchNorm2d).to(device)
    freeze(model)
    model.requires_grad_(True)
    assert freeze(model).changes.changes[0].what == "affine.requires_grad"
    assert not any(required(model).values())


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    calls=st.lists(st.one_of(st.none(), st.sampled_from(SWITCHES)), max_size=5),
    grads=st.tuples(st.booleans(), st.booleans()),
    tracked=st.booleans(),
)
def test_any_sequence_shows_the_last_call_and_comes_back(kind, calls, grads, tracked, device):
    make, shape = KINDS[kind]
    model = trained(make).to(device)
    model[0].weight.requires_grad_(grads[0])
    model[0].bias.requires_grad_(grads[1])
    model[0].track_running_stats = tracked
    before, receipts, seen = everything(model), [], [everything(model)]
    for on in calls:
        receipts.append(unfreeze(model) if on is None else freeze(model, **on))
        seen.append(everything(model))
        on = on or dict.fromkeys(NAMES, False)
        layer = model[0]
        assert isinstance(layer, FrozenBatchNorm) is on["normaliser"]
        assert tuple(required(model).values()) == ((False, False) if on["affine"] else grads)
        state = state_of(model)
        copied = copy.deepcopy(model).train()
        copied(torch.randn(shape).to(device))
        assert same_state(state_of(copied), state) is (on["buffers"] or not tracked)
    for receipt in reversed(receipts):
        assert_same(everything(model), seen.pop())
        receipt.undo()
    assert_same(everything(model), before)
    for on in calls:
        unfreeze(model) if on is None else freeze(model, **on)
    unfreeze(model)
    assert_same(everything(model), before)


def test_receipts_are_undone_in_the_reverse_order(device):
    model = build("resnet").to(device)
    before = everything(model)
    receipts = [
        freeze(model, normaliser=False, affine=False),
        freeze(model),
        unfreeze(model, layers=["bn1"]),
        bnlab.convert(model, bnlab.nn.BatchNorm2d, layers=["bn1"]),
    ]
    for receipt in receipts[:-1]:
        with pytest.raises(UsageError, match=r"^undo: every module must be unchanged"):
            receipt.undo()
    for receipt in reversed(receipts):
        receipt.undo()
    assert_same(everything(model), before)
    converted = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    freeze(model, normaliser=False)
    with pytest.raises(UsageError, match=r"^undo: every module must be unchanged"):
        converted.undo()


def test_an_exception_in_the_middle_leaves_the_model_as_it_was(monkeypatch, device):
    model = build("resnet").to(device)
    model(images(2).to(device)).sum().backward()
    freeze(model, layers=["bn1"], normaliser=False)
    before, grads = everything(model), [p.grad for p in model.parameters()]
    apply, count = Conversion.apply, itertools.count()

    def breaking(self):
        if next(count) == 4:
            raise KeyboardInterrupt
        return apply(self)

    monkeypatch.setattr(Conversion, "apply", breaking)
    with pytest.raises(KeyboardInterrupt):
        freeze(model)
    monkeypatch.undo()
    assert_same(everything(model), before)
    assert all(left is right for left, right in zip(grads, (p.grad for p in model.parameters()), strict=True))


class Scaled(nn.BatchNorm2d):
    def forward(self, input):
        return 1.001 * super().forward(input)


class Stubborn(nn.BatchNorm2d):
    """Moves its statistics whatever track_running_stats says."""

    def forward(self, input):
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class WithScale(nn.BatchNorm2d):
    def forward(self, input, scale):
        return super().forward(input) * scale


def test_a_class_of_its_own_keeps_its_class_or_is_refused(device):
    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3), Scaled(3)).to(device)
    before = everything(model)
    with pytest.raises(UsageError) as err:
        freeze(model)
    assert str(err.value).startswith("1: layer must do nothing beyond BN and an activation, got ")
    assert str(err.value).endswith("convert it by hand. Refused too: 2.")
    assert_same(everything(model), before)
    receipt = freeze(model, normaliser=False)
    assert receipt.changes.notes == ()
    assert {type(layer) for layer in model} == {nn.BatchNorm2d, Scaled}
    state = state_of(model)
    model.train()(torch.randn(4, 3, 5, 5).to(device))
    assert same_state(state_of(model), state)
    unfreeze(model)
    assert_same(everything(model), before)


def test_a_forward_that_does_not_obey_is_refused_and_one_that_cannot_be_tried_is_named(device):
    model = nn.Sequential(nn.BatchNorm2d(3), Stubborn(3)).to(device)
    with pytest.raises(UsageError, match=r"^1: layer must keep its running statistics with track_running_stats=False"):
        freeze(model, normaliser=False)
    assert model[0].track_running_stats
    assert "1" not in str(freeze(model, normaliser=False, buffers=False).changes.notes)
    patched = nn.BatchNorm2d(3).to(device)
    patched.forward = lambda x: x
    for layer in (WithScale(3).to(device), patched):
        (note,) = freeze(layer, normaliser=False).changes.notes
        assert note.startswith("model: ")
        assert note.endswith("failed in a test run: check that it obeys track_running_stats")


def test_layers_without_running_statistics(device):
    lone = nn.BatchNorm2d(3, track_running_stats=False).to(device)
    model = nn.Sequential(nn.BatchNorm2d(3), copy.deepcopy(lone), copy.deepcopy(lone)).to(device)
    for on in ({"affine": False}, {"normaliser": False}, {"buffers": False}):
        with pytest.raises(UsageError) as err:
            freeze(model, layers=["1", "2"], **on)
        assert str(err.value) == (
            "1: layer must keep running statistics to freeze the normaliser or buffers, got none. "
            "Freeze affine alone, or leave it out with layers=. Refused too: 2."
        )
        with pytest.raises(UsageError, match=r"^model: layer must keep running statistics"):
            freeze(lone, **on)
    receipt = freeze(model)
    assert [(left.layer, left.reason) for left in receipt.changes.left_alone] == [
        ("1", "it keeps no running statistics"), ("2", "it keeps no running statistics")
    ]  # fmt: skip
    assert model[1].weight.requires_grad
    freeze(model, layers=["1"], normaliser=False, buffers=False)
    assert not model[1].weight.requires_grad


def test_layers_that_were_not_frozen_by_freeze_are_left_alone(device):
    model = nn.Sequential(nn.BatchNorm2d(3), bnlab.nn.FrozenBatchNorm2d(3), nn.BatchNorm2d(3)).to(device)
    bnlab.convert(model, bnlab.nn.FrozenBatchNorm2d, layers=["2"])
    receipt = unfreeze(model)
    assert str(receipt) == (
        "unfreeze: 0 layers changed, output kept\n"
        "  left alone: it is not frozen by freeze (0)\n"
        "  left alone: its class is a frozen one, but freeze did not set it: use convert (1, 2)"
    )
    kinds = [type(layer) for layer in model]
    freeze(model, layers=["1", "2"])
    assert not hasattr(model[1], "frozen_from")
    model[1].requires_grad_(True)
    model[1].moves_statistics = True
    freeze(model, layers=["1"])
    assert not model[1].moves_statistics
    unfreeze(model)
    assert [type(layer) for layer in model] == kinds
    assert model[1].weight.requires_grad
    assert model[1].moves_statistics


def test_a_layer_with_two_names_and_a_shared_parameter(device):
    shared = nn.BatchNorm2d(4).to(device)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.BatchNorm2d(4)}).to(device)
    model["c"].weight = shared.weight
    receipt = freeze(model)
    assert {change.layer for change in receipt.changes.changes} == {"a", "c"}
    unfreeze(model)
    assert all(required(model).values())
    assert model["a"] is model["b"]


def test_bad_calls_are_refused(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    for arguments, message in (
        (dict.fromkeys(NAMES, False), "freeze: one of normaliser, buffers and affine must be True, got none. Call"),
        ({"buffers": 1}, "freeze: buffers must be True or False, got 1."),
        ({"layers": ["1"]}, "layers: each must lead to a BN layer, got '1'."),
    ):
        with pytest.raises(UsageError) as err:
            freeze(model, **arguments)
        assert str(err.value).startswith(message)
    with pytest.raises(UsageError, match="layers: each must lead to a BN layer"):
        unfreeze(model, layers=["1"])
    for action in (freeze, unfreeze):
        with pytest.raises(NoBatchNorm):
            action(nn.Linear(2, 2).to(device))
    for on in SWITCHES:
        with pytest.raises(UsageError, match=r"^0: layer must know its number of channels, got a lazy layer"):
            freeze(
                nn.Sequential(nn.LazyBatchNorm2d()),
                layers=None if on["normaliser"] or on["buffers"] else ["0"],
                **on,
            )
    assert type(model[0]) is nn.BatchNorm2d


def test_a_parametrized_weight(device):
    layer = parametrizations.weight_norm(nn.BatchNorm2d(3).to(device), "weight", dim=0)
    with pytest.raises(UsageError, match="have weight and bias as plain parameters"):
        freeze(layer)
    receipt = freeze(layer, normaliser=False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert "parametrizations.weight.original0" in receipt.changes.changes[-1].before
    unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_only_weight_and_bias_are_affine(device):
    model = nn.Sequential(BatchNormAct2d(3, nn.PReLU)).to(device)
    freeze(model, normaliser=False)
    assert required(model) == {"0.weight": False, "0.bias": False, "0.act.weight": True}


class Group:
    """Stands for a process group."""


def test_a_process_group_comes_back(device):
    for on in SWITCHES:
        model = trained(functools.partial(nn.SyncBatchNorm, process_group=Group())).to(device)
        group = model[0].process_group
        freeze(model, **on)
        unfreeze(model)
        assert model[0].process_group is group
        assert type(model[0]) is nn.SyncBatchNorm


def test_a_sync_layer_takes_any_rank_once_it_is_frozen(device):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("cnn3d").to(device))
    expected = copy.deepcopy(model).eval()(images(4).to(device).fill_(0.5))
    freeze(model)
    assert_close(model.train()(images(4).to(device).fill_(0.5)), expected, rtol=1e-4, atol=1e-5)
    bnlab.convert(model, nn.SyncBatchNorm)
    assert {type(m) for m in model.modules() if isinstance(m, _BatchNorm)} == {nn.SyncBatchNorm}
    assert all(required(model).values())


def test_converting_on_ends_what_the_class_froze(device):
    model = build("timm").to(device)
    before = required(model)
    freeze(model)
    receipt = bnlab.convert(model, bnlab.nn.BatchRenorm2d)
    assert "bias.requires_grad: False -> True" in str(receipt)
    assert required(model) == before
    assert not any(hasattr(module, "frozen_from") for module in model.modules())
    assert {left.reason for left in unfreeze(model).changes.left_alone} == {"it is not frozen by freeze"}
    receipt.undo()
    assert not model.bn1.weight.requires_grad
    unfreeze(model)
    assert [type(model.bn1), type(model.bn2)] == [BatchNormAct2d, BatchNormReLU]
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    freeze(model)
    bnlab.convert(model, functools.partial(nn.GroupNorm, 3))
    assert all(required(model).values())
    assert not hasattr(model[0], "frozen_from")


def test_converting_keeps_what_does_not_hang_on_the_class(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    freeze(model, normaliser=False)
    for to in (bnlab.nn.BatchNorm2d, bnlab.nn.FrozenBatchNorm2d, nn.BatchNorm2d):
        bnlab.convert(model, to)
        state = state_of(model)
        model(torch.randn(4, 3, 5, 5).to(device))
        assert same_state(state_of(model), state)
        assert not any(required(model).values())
    unfreeze(model)
    assert model[0].track_running_stats
    assert all(required(model).values())
    freeze(model, normaliser=False)
    bnlab.convert(model, functools.partial(nn.GroupNorm, 3))
    assert not hasattr(model[0], "frozen_from")


def test_moving_statistics_are_an_option_of_convert(device):
    to = functools.partial(bnlab.nn.FrozenBatchNorm2d, moves_statistics=True)
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    bnlab.convert(model, to)
    assert model[0].moves_statistics
    bnlab.convert(model, nn.BatchNorm2d)
    assert not hasattr(model[0], "moves_statistics")
    freeze(model)
    assert "moves_statistics: False -> True (0)" in str(bnlab.convert(model, to))
    unfreeze(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_what_was_fused_in_since_is_not_lost(device):
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(device), torch.randn(4, 3, 5, 5).to(device)
    freeze(model)
    fused = bnlab.convert(model, bnlab.nn.FrozenBatchNorm2d, fuse=True, example=x)
    assert model[0].activation == "relu"
    with pytest.raises(
        UsageError, match=r"^0: layer must be unchanged since it was frozen .* Undo the fusing first\.$"
    ):
        unfreeze(model)
    fused.undo()
    unfreeze(model)
    assert type(model[0]) is nn.BatchNorm2d
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    freeze(model)
    bnlab.convert(model, bnlab.nn.FrozenBatchNorm2d, fuse=True, example=x)
    unfreeze(model)
    assert (type(model[0]), model[0].activation) == (bnlab.nn.BatchNorm2d, "relu")


class OnlyNamed(nn.BatchNorm2d):
    """A class of its own, with nothing of its own."""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = OnlyNamed(3)

    def forward(self, x):
        return self.bn(x) + x


def test_a_residual_is_not_lost_on_the_way_back_to_a_class_of_ones_own(device):
    model, x = Residual().to(device), torch.randn(4, 3, 5, 5).to(device)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=x)
    with pytest.raises(UsageError, match="have no residual to become"):
        bnlab.convert(model, nn.BatchNorm2d)


class Mine(bnlab.nn.BatchNorm2d):
    def forward(self, input):
        return F.silu(super().forward(input))


def test_a_subclass_of_bnlabs_layer_comes_back_without_its_activation_twice(device):
    model, x = trained(Mine).to(device), torch.randn(SHAPES[2]).to(device)
    expected = model.eval()(x)
    before = everything(model)
    freeze(model)
    assert model[0].activation == "silu"
    assert_close(model.train()(x), expected)
    unfreeze(model.eval())
    assert_same(everything(model), before)
    assert torch.equal(model(x), expected)


def test_a_compiled_model_is_frozen_too(device):
    model, x = trained(nn.BatchNorm2d).to(device).train(), torch.randn(SHAPES[2]).to(device)
    run = torch.compile(model, backend="aot_eager")
    run(x)
    freeze(run, layers=["_orig_mod.0"])
    state = state_of(model)
    assert_close(run(x).double(), by_the_book(model[0], x), rtol=1e-5, atol=1e-5)
    freeze(model, normaliser=False)
    run(x)
    assert same_state(state_of(model), state)
    unfreeze(model)
    run(x)
    assert model[0].num_batches_tracked == state["0.num_batches_tracked"] + 1
    torch._dynamo.reset()


def test_the_record_follows_the_schema_and_reads_well(device):
    jsonschema = pytest.importorskip("jsonschema")
    model = build("resnet").to(device)
    for receipt in (freeze(model, buffers=False), unfreeze(model)):
        data = receipt.changes.to_json()
        jsonschema.validate(data, json_schema("bnlab.receipt/1"))
        assert Changes.from_json(data) == receipt.changes
        assert receipt.changes.safety is Safety.BEHAVIOUR
    assert str(freeze(model, layers=["bn1", "layer1.0.*"], normaliser=False)) == (
        "freeze: 3 layers changed, behaviour changed\n"
        "  running statistics: moving -> fixed (bn1, layer1.0.bn1, layer1.0.bn2)\n"
        "  affine.requires_grad: weight, bias -> none (bn1, layer1.0.bn1, layer1.0.bn2)"
    )
