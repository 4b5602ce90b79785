import contextlib
import copy
import pickle
import random
import types

import pytest
import torch
from tests.architectures import ARCHITECTURES, BasicBlock, ResNet, build, images
from tests.unit.remedies.convert.samples import assert_same, outputs, snapshot
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnlab
from bnlab.errors import UsageError

BatchNorm2d = bnlab.nn.BatchNorm2d


def fuse(model, example):
    return bnlab.convert(model, BatchNorm2d, fuse=True, example=example)


def taken_in(model):
    layers = (m for m in model.modules() if isinstance(m, bnlab.nn.BatchNorm1d.__base__))
    return [layer.activation for layer in layers]


TAKEN_IN = {
    "resnet": ["relu"] * 9 + [None],
    "preact": ["relu"] * 5,
    "mobilenet": ["relu6"] * 5 + [None] * 2,
    "densenet": ["relu"] * 7,
    "mlp": ["relu", "sigmoid"],
    "cnn3d": ["silu", "elu", "tanh"],
    "timm": ["relu", "relu", "silu"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_networks_compute_the_same_and_undo(name, device):
    model, x = build(name).to(device).double(), images(8).to(device).double()
    keys, before, expected = [*model.state_dict()], snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert sorted(map(str, taken_in(model))) == sorted(map(str, TAKEN_IN[name]))
    assert [*model.state_dict()] == keys
    assert_close(outputs(model, x), expected, rtol=1e-8, atol=1e-9)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_what_a_resnet_takes_in(device):
    model = build("resnet").to(device)
    receipt = fuse(model, images(4).to(device))
    assert str(receipt) == (
        "convert: 15 layers changed, output kept\n"
        "  class: torch.nn.BatchNorm2d -> bnlab.nn.BatchNorm2d (bn1, layer1.0.bn1, layer1.0.bn2, layer1.1.bn1, "
        "layer1.1.bn2, layer2.0.bn1, layer2.0.bn2, layer2.0.downsample.1 and 2 more)\n"
        "  class: torch.nn.ReLU -> torch.nn.Identity (relu)\n"
        "  activation: None -> relu (bn1, layer1.0.bn1, layer1.0.bn2, layer1.1.bn1, layer1.1.bn2, layer2.0.bn1, "
        "layer2.0.bn2, layer2.1.bn1 and 1 more)\n"
        "  forward: tests.architectures.BasicBlock -> rewritten for its fused layers "
        "(layer1.0, layer1.1, layer2.0, layer2.1)\n"
        "  residual: - -> taken in (layer1.0.bn2, layer1.1.bn2, layer2.0.bn2, layer2.1.bn2)\n"
        "  left alone: it is added to another tensor in place (layer2.0.downsample.1)"
    )
    assert isinstance(model.layer1[0], BasicBlock)
    assert model.layer1[0].expansion == 1
    assert isinstance(model, ResNet)


def losses(model, steps=12):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses_by_step = []
    for _ in range(steps):
        x, labels = images(16).double(), torch.randint(10, (16,))
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses_by_step.append(loss.item())
    return losses_by_step


@pytest.mark.trains
def test_a_fused_resnet_trains_to_the_same_loss_curve(device):
    original = build("resnet").to(device).double()
    fused = copy.deepcopy(original)
    fuse(fused, images(4).to(device).double())
    expected = losses(original)
    assert losses(fused) == pytest.approx(expected, rel=1e-8)
    assert_close(fused.state_dict(), original.state_dict(), rtol=1e-7, atol=1e-8)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


def test_copies_pickles_compile_and_export(device):
    model, x = build("resnet").to(device), images(4).to(device)
    fuse(model, x)
    expected = copy.deepcopy(model)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.layer1[0], BasicBlock)
        assert torch.equal(copy.deepcopy(other)(x), expected)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected)
    torch._dynamo.reset()
    model.eval()
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))


class Model(nn.Module):
    """One BN layer; a test says what is behind it."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()


def reason(kind, example=None):
    model = kind()
    before = snapshot(model)
    receipt = fuse(model, images(4) if example is None else example)
    (left,) = receipt.changes.left_alone
    assert left.layer == "bn"
    assert taken_in(model) == [None]
    receipt.undo()
    assert_same(snapshot(model), before)
    return left.reason


class UsedTwice(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) + y.mean()


class Returned(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return {"features": y, "out": self.relu(y)}


class InANamespace(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return (types.SimpleNamespace(before=y), self.relu(y))


class KeptByTheModule(Model):
    def forward(self, x):
        self.seen = self.bn(self.conv(x))
        return self.relu(self.seen)


class NothingKnown(Model):
    def forward(self, x):
        return self.bn(self.conv(x)).abs()


class OtherSlope(Model):
    def forward(self, x):
        return F.leaky_relu(self.bn(self.conv(x)), 0.2)


class Broadcast(Model):
    def forward(self, x):
        return self.bn(self.conv(x)) + torch.ones(1, 4, 1, 1)


class AddedToItself(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + y


class Scaled(Model):
    def forward(self, x):
        return torch.add(self.bn(self.conv(x)), self.conv(x), alpha=2)


class Constant(Model):
    def forward(self, x):
        return self.bn(self.conv(x)) + 1.0


class Twice(Model):
    def forward(self, x):
        return self.bn(self.relu(self.bn(self.conv(x))))


class IntoAnother(Model):
    def forward(self, x):
        total = self.conv(x) * 1
        total += self.bn(self.conv(x))
        return total


class Masked(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y[:, :1] = 0.0
        return self.relu(y)


class ByMode(Model):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) if self.training else F.relu6(self.bn(self.conv(x)))


class DropoutByMode(Model):
    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


class Context(Model):
    def forward(self, x):
        with contextlib.nullcontext():
            return F.relu(self.bn(self.conv(x)))


class ContextInAMethod(Model):
    def behind(self, y):
        with torch.no_grad():
            return F.relu(y)

    def forward(self, x):
        return self.behind(self.bn(self.conv(x)))


class Decorated(Model):
    @torch.enable_grad()
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Random(Model):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * random.uniform(1, 1)


class Counting(Model):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn(self.conv(x)))


class Logging(Model):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        self.log.append(y.mean().detach())
        return y


class ByValue(Model):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if x.sum() < 1e9 else y


class ByGrad(Model):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        return y if torch.is_grad_enabled() else 2 * y


class BySetting(Model):
    scale = 1.0

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * self.scale


class Optional(Model):
    def forward(self, x, y=None):
        z = self.relu(self.bn(self.conv(x)))
        return z if y is None else z + self.relu(self.conv(y))


class Before(Model):
    def forward(self, x, before=False):
        y = self.bn(self.conv(x))
        return y if before else self.relu(y)


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1000, 1000)


class CustomGradient(Model):
    def forward(self, x):
        return F.relu(self.bn(self.conv(Clip.apply(x))))


class Checkpointed(Model):
    def forward(self, x):
        return F.relu(self.bn(checkpoint(self.conv, x, use_reentrant=False)))


class Hooked(Model):
    def __init__(self):
        super().__init__()
        self.bn.register_forward_hook(lambda module, x, y: None)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class HookedActivation(Model):
    def __init__(self):
        super().__init__()
        self.relu.register_forward_hook(lambda module, x, y: None)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class OwnState(Model):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    def __getstate__(self):
        return vars(self)


LEFT_ALONE = {
    UsedTwice: "its output is used more than once, or returned",
    Returned: "its output is used more than once, or returned",
    InANamespace: "its output is used more than once, or returned",
    KeptByTheModule: "its output is used more than once, or returned",
    NothingKnown: "neither an activation nor an addition follows it",
    OtherSlope: "neither an activation nor an addition follows it",
    Broadcast: "the tensor that is added to it has another shape or dtype",
    AddedToItself: "the addition does not add another tensor",
    Scaled: "neither an activation nor an addition follows it",
    Constant: "the addition does not add another tensor",
    Twice: "it ran 2 times in one forward pass",
    IntoAnother: "it is added to another tensor in place",
    Masked: "neither an activation nor an addition follows it",
    ByMode: "different operations follow it in train mode and in eval mode",
    ContextInAMethod: "its forward uses its output in self.behind(self.bn(self.conv(x)))",
    Decorated: "its forward is wrapped",
    ByValue: "its output is used more than once, or returned",
    Before: "its output is used more than once, or returned",
    Hooked: "a hook reads its output",
    HookedActivation: "a hook reads its output in self.relu",
}


@pytest.mark.parametrize(("kind", "expected"), LEFT_ALONE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_left_alone(kind, expected):
    assert reason(kind) == expected


FUSED = [
    DropoutByMode, Context, Random, Counting, Logging, ByGrad, BySetting, Optional, CustomGradient, Checkpointed,
    OwnState,
]  # fmt: skip


@pytest.mark.parametrize("kind", FUSED)
def test_what_else_a_forward_does_stays(kind, device):
    model, x = kind().to(device).double(), images(4).to(device).double()
    before, expected = snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert taken_in(model) == ["relu"]
    assert_close(outputs(model, x), expected)
    receipt.undo()
    assert_same({**snapshot(model), "attributes": None}, {**before, "attributes": None})


class Left(Model):
    def forward(self, x):
        return self.conv(x) + self.bn(self.conv(x))


class Right(Model):
    def forward(self, x):
        return torch.add(self.bn(self.conv(x)), self.conv(x)).relu()


class Position(Model):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 16, 16))

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.position)


@pytest.mark.parametrize(("kind", "activation"), [(Left, None), (Right, "relu")])
def test_additions_from_either_side_and_with_nothing_behind(kind, activation, device):
    model, x = kind().to(device), images(4).to(device)
    expected = copy.deepcopy(model)(x)
    receipt = fuse(model, x)
    assert "residual: - -> taken in (bn)" in str(receipt)
    assert model.bn.activation == activation
    assert_close(model(x), expected)


def test_a_residual_that_fits_the_example_by_chance_still_broadcasts(device):
    model, x = Position().to(device), images(4).to(device)
    expected = copy.deepcopy(model)(x)
    fuse(model, x[:1])
    assert model.bn.activation == "relu"
    assert_close(model(x), expected)


class Block(Model):
    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


def test_autocast_promotes_as_before(device):
    model, x = nn.Sequential(Block()).to(device), images(4).to(device)
    original = copy.deepcopy(model)
    fuse(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), original(x)
    assert y.dtype == expected.dtype == torch.float32
    assert_close(y, expected)


class Elsewhere(Model):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))).mean() + self.relu(x).mean()


def test_an_activation_module_that_is_also_used_elsewhere_stays(device):
    model, x = Elsewhere().to(device), images(4).to(device)
    expected = copy.deepcopy(model)(x)
    fuse(model, x)
    assert (model.bn.activation, type(model.relu)) == ("relu", nn.ReLU)
    assert_close(model(x), expected)


class Inner(Model):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, *, image, scale):
        return {"logits": [self.inner(image) * scale]}


def test_keyword_examples_and_nested_outputs(device):
    model, example = Keywords().to(device), {"image": images(4).to(device), "scale": torch.tensor(2.0).to(device)}
    fuse(model, example)
    assert model.inner.bn.activation == "relu"


class TwoLayers(Model):
    def __init__(self):
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(F.relu(self.bn(self.conv(x)))))


def test_fusing_a_second_layer_of_one_module_later(device):
    model, x = nn.Sequential(TwoLayers()).to(device), images(4).to(device)
    bnlab.convert(model, BatchNorm2d, layers=["0.bn"], fuse=True, example=x)
    receipt = bnlab.convert(model, BatchNorm2d, layers=["0.bn2"], fuse=True, example=x)
    assert [left.reason for left in receipt.changes.left_alone] == ["its forward was rewritten before"]


def test_undo_out_of_order_is_refused(device):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Block2()).to(device),
        images(4).to(device),
    )
    before = snapshot(model)
    first = bnlab.convert(model, BatchNorm2d)
    second = fuse(model, x)
    with pytest.raises(UsageError, match=r"^undo: every module must be unchanged, got a BatchNorm2d that was"):
        first.undo()
    second.undo()
    first.undo()
    assert_same(snapshot(model), before)


class Block2(Model):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


def test_a_residual_that_was_taken_in_is_not_lost_on_the_way_back(device):
    model, x = nn.Sequential(Left()).to(device), images(4).to(device)
    fuse(model, x)
    with pytest.raises(UsageError, match=r"^0.bn: layer must have no residual to become torch.nn.BatchNorm2d, got one"):
        bnlab.convert(model, nn.BatchNorm2d)
    bnlab.convert(model, bnlab.nn.GhostBatchNorm2d)
    model(x)


class Momentum(Model):
    """A key encoder that follows the query encoder, as in MoCo."""

    def __init__(self):
        super().__init__()
        self.key = copy.deepcopy(self.conv).requires_grad_(False)

    def forward(self, x):
        self.key.weight.data = self.key.weight.data * 0.9 + self.conv.weight.data * 0.1
        return F.relu(self.bn(self.conv(x))) - self.key(x)


def test_parameters_that_forward_replaces_are_put_back(device):
    model = Momentum().to(device)
    nn.init.normal_(model.key.weight)
    before = snapshot(model)
    fuse(model, images(4).to(device)).undo()
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("example", ["text", {"wrong": torch.ones(1)}])
def test_an_example_that_does_not_fit_is_refused(example, device):
    model = nn.Sequential(Inner()).to(device)
    with pytest.raises(
        UsageError, match=r"^model: forward must run on the example in either mode, got|^Sequential: a batch must fit"
    ):
        fuse(model, example)
    assert type(model[0].bn) is nn.BatchNorm2d


def test_lazy_models_are_refused(device):
    with pytest.raises(UsageError, match="must know its shapes, got a lazy layer"):
        fuse(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device), images(4).to(device))


def test_models_without_tensors_to_compare_are_refused(device):
    class Text(Model):
        def forward(self, x):
            return str(self.relu(self.bn(self.conv(x))).sum())

    with pytest.raises(UsageError, match="must return tensors to prove that fusing changed nothing, got none"):
        fuse(Text(), images(4).to(device))


def test_a_fusion_that_is_not_equal_is_refused_and_taken_back(monkeypatch, device):
    from bnlab.remedies.convert import fuse as _fuse

    model, x = build("resnet").to(device), images(4).to(device)
    before = snapshot(model)
    right = _fuse._activate
    monkeypatch.setattr(_fuse, "_activate", lambda layer, path, name, *rest: right(layer, path, "sigmoid", *rest))
    with pytest.raises(UsageError) as err:
        fuse(model, x)
    assert str(err.value).startswith("convert: the fused model must give the output in train mode it gave before, got")
    assert_same(snapshot(model), before)


class Raises(Model):
    def forward(self, x):
        raise RuntimeError("no")


def test_a_model_that_raises_is_as_it_was(device):
    model = Raises().to(device)
    before = snapshot(model)
    with pytest.raises(UsageError, match="got RuntimeError: no"):
        fuse(model, images(4).to(device))
    assert_same(snapshot(model), before)


def test_fusing_leaves_modes_buffers_gradients_and_random_numbers_alone(device):
    model, x = build("mobilenet").to(device), images(4).to(device)
    model.features[0].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1).to(device)
    torch.manual_seed(3)
    fuse(model, x)
    assert torch.equal(torch.rand(1).to(device), expected)
    assert [m.training for m in model.modules()] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_residual_layers_of_half_precision(device):
    model, x = build("resnet").to(device).bfloat16(), images(4).to(device).bfloat16()
    fuse(model, x)
    assert taken_in(model).count("relu") == 9


class ConvBatchNorm(nn.Module):
    """BN in a module of its own, with nothing behind it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.Identity()

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.drop(x)


class AcrossModules(nn.Module):
    """BN in one module, the activation in another one, and modules between them that do nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(ConvBatchNorm(3, 4), nn.Identity(), nn.ReLU())
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Identity())
        self.drop_block, self.act, self.aa = nn.Identity(), nn.SiLU(inplace=True), nn.Identity()
        self.head = ConvBatchNorm(4, 4)

    def forward(self, x):
        x = self.body(self.stem(x))
        x = self.drop_block(x)
        x = self.aa(self.act(x))
        return F.gelu(self.head(x)) + x


def test_fusing_crosses_the_borders_of_modules(device):
    model, x = AcrossModules().to(device).double(), images(4).to(device).double()
    keys, before, expected = [*model.state_dict()], snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert taken_in(model) == ["relu", "silu", "gelu"]
    assert [type(module) for module in (model.stem[2], model.act)] == [nn.Identity, nn.Identity]
    assert receipt.changes.left_alone == ()
    assert [*model.state_dict()] == keys
    assert_close(outputs(model, x), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(outputs(other, x), expected)
    receipt.undo()
    assert_same(snapshot(model), before)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ConvBatchNorm(3, 3)

    def forward(self, x):
        return self.inner(x) + x


class HookedOnTheWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ConvBatchNorm(3, 3)
        self.inner.register_forward_hook(lambda module, x, y: None)

    def forward(self, x):
        return F.relu(self.inner(x))


class AlsoReturned(nn.Module):
    """The activation follows the module, but the module has another output."""

    def __init__(self):
        super().__init__()
        self.inner = ConvBatchNorm(3, 3)
        self.inner.forward_features = None

    def forward(self, x, before=False):
        y = self.inner(x)
        return y if before else F.relu(y)


@pytest.mark.parametrize(
    ("kind", "reason", "path"),
    [
        (Residual, "the operation that follows it runs in another module", "inner.bn"),
        (HookedOnTheWay, "a hook reads its output", "inner.bn"),
        (AlsoReturned, "its output is used more than once, or returned", "inner.bn"),
    ],
)
def test_borders_that_fusing_does_not_cross(kind, reason, path, device):
    receipt = fuse(kind().to(device), images(4).to(device))
    assert [(left.layer, left.reason) for left in receipt.changes.left_alone] == [(path, reason)]


class InAList(nn.Module):
    """A loop over lists. Each layer is in a module of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([ConvBatchNorm(3, 3) for _ in range(3)])
        self.act = nn.ReLU()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class AddsInAList(InAList):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.layers = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        for i in range(len(self.layers)):
            y = self.layers[i](self.convs[i](x))
            x = F.silu(y + x)
        return x


class ActivationsInAList(AddsInAList):
    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList(nn.ELU() for _ in range(3))

    def forward(self, x):
        for conv, bn, act in zip(self.convs, self.layers, self.acts, strict=True):
            x = act(bn(conv(x)))
        return x


@pytest.mark.parametrize(
    ("kind", "activation"), [(InAList, "relu"), (AddsInAList, "silu"), (ActivationsInAList, "elu")]
)
def test_a_loop_over_a_list_takes_in_the_activation_of_every_element(kind, activation, device):
    model, x = kind().to(device).double(), images(4).to(device).double()
    keys, before, expected = [*model.state_dict()], snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert taken_in(model) == [activation] * 3
    assert receipt.changes.left_alone == ()
    assert [*model.state_dict()] == keys
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(outputs(other, x), expected)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_an_activation_module_of_one_loop_becomes_an_identity(device):
    model = InAList().to(device)
    fuse(model, images(4).to(device))
    assert type(model.act) is nn.Identity
    assert type(model) is InAList


class Hooks(InAList):
    def __init__(self):
        super().__init__()
        self.layers[1].register_forward_hook(lambda module, x, y: None)


class OtherClass(InAList):
    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Conv2d(3, 3, 1)


class OtherActivation(InAList):
    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Sequential(self.layers[1], nn.SiLU())


class SharedElement(InAList):
    def __init__(self):
        super().__init__()
        self.first = self.layers[1]


class OneMore(InAList):
    """The code calls an element once more, without an activation, for large batches."""

    def forward(self, x):
        x = super(InAList, self).forward(x) if x is None else x
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class CalledElsewhere(InAList):
    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return self.layers[0](x) if x.shape[0] > 100 else x


class NeverRun(InAList):
    def forward(self, x):
        for layer, _ in zip(self.layers, range(2), strict=False):
            x = self.act(layer(x))
        return x


class ByIndex(InAList):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < 3:
                x = self.act(x)
        return x


class Stops(InAList):
    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
            if x.shape[0] > 100:
                break
        return x


class Otherwise(InAList):
    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        else:
            x = x + 1
        return x


class Kept(InAList):
    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            if x.shape[0] > 100:
                outputs.append(x)
            x = self.act(x)
        return sum(outputs, x)


MISSING = "the same code calls layers.1, which cannot take it in"


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        (Hooks, [MISSING, "a hook reads its output", MISSING]),
        (OtherClass, [MISSING, MISSING]),
        (OtherActivation, [MISSING, MISSING]),
        (SharedElement, [MISSING, "it is called from more than one place", MISSING]),
        (OneMore, ["its forward uses variables of an enclosing function, or super()"] * 3),
        (CalledElsewhere, ["its forward depends on x.shape[0] > 100"] * 3),
        (NeverRun, [MISSING.replace("1", "2")] * 2 + ["it ran 0 times in one forward pass"]),
        (ByIndex, ["its forward depends on i < 3"] * 3),
        (Stops, ["its forward may leave the loop over the list early"] * 3),
        (Otherwise, ["its forward may leave the loop over the list early"] * 3),
        (Kept, ["its forward depends on x.shape[0] > 100"] * 3),
    ],
)
def test_a_loop_in_which_one_element_differs_is_left_alone(kind, reasons, device):
    model = kind().to(device)
    before = snapshot(model)
    receipt = fuse(model, images(4).to(device))
    left = {item.layer: item.reason for item in receipt.changes.left_alone}
    assert [left[path] for path in sorted(left)] == reasons
    receipt.undo()
    assert_same(snapshot(model), before)


def test_layers_of_a_list_that_are_not_chosen(device):
    model = InAList().to(device)
    receipt = bnlab.convert(
        model, BatchNorm2d, fuse=True, example=images(4).to(device), layers=["layers.0.bn", "layers.2.bn"]
    )
    assert {item.reason for item in receipt.changes.left_alone} == {MISSING}


def test_a_bias_before_bn_has_no_gradient_to_compare(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ELU()
    ).to(device)
    fuse(model, 100 * images(8).to(device) + 300)
    assert taken_in(model) == ["relu", "elu"]


def timm_model(name):
    from tests import torchvision_operators  # noqa: F401 - declares what timm imports

    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=4)


def test_a_resnet_of_timm(device):
    model, x = timm_model("test_resnet").double(), images(4).to(device).double()
    layers = len(taken_in(fuse(copy.deepcopy(model), x).model))
    before, expected = snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    left = {left.layer for left in receipt.changes.left_alone}
    assert all("downsample" in path for path in left)
    assert len(left) < layers / 3
    assert type(model.act1) is nn.Identity
    assert_close(outputs(model, x), expected)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_a_res2net_of_timm_calls_its_layers_from_lists(device):
    timm_model("test_resnet")
    from timm.models.res2net import Bottle2neck

    torch.manual_seed(0)
    model = (
        nn.Sequential(
            Bottle2neck(16, 8, downsample=nn.Conv2d(16, 32, 1), norm_layer=nn.BatchNorm2d),
            Bottle2neck(32, 8, norm_layer=nn.BatchNorm2d),
        )
        .to(device)
        .double()
    )
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64).to(device)
    keys, before, expected = [*model.state_dict()], snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert taken_in(model) == ["relu"] * 10
    assert receipt.changes.left_alone == ()
    assert "for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):" in model[1]._code
    assert isinstance(model[1], Bottle2neck)
    assert [*model.state_dict()] == keys
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(outputs(other, x), expected)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_a_hrnet_of_timm_calls_the_forward_of_a_sequence_from_a_list(device):
    timm_model("test_resnet")
    from timm.models.hrnet import HighResolutionNet, cfg_cls

    torch.manual_seed(0)
    config = copy.deepcopy(cfg_cls["hrnet_w18_small"])
    for number in range(1, 5):
        stage = config[f"stage{number}"]
        stage.update(num_modules=1, num_blocks=(1,) * number, num_channels=tuple(2**n for n in range(number)))
    model, x = HighResolutionNet(config, num_classes=3, head_conv_bias=True), torch.randn(2, 3, 32, 32).to(device)
    left = {item.layer for item in fuse(model, x).changes.left_alone}
    assert not any(path.startswith("downsamp_modules") for path in left)
    assert [type(block[2]) for block in model.downsamp_modules] == [nn.Identity] * 3


def test_torchvision_mobilenet(device):
    from tests import torchvision_operators  # noqa: F401 - declares what torchvision imports

    torchvision = pytest.importorskip("torchvision")
    model, x = torchvision.models.mobilenet_v2(weights=None, width_mult=0.1), torch.randn(2, 3, 32, 32).to(device)
    receipt = fuse(model, x)
    layers = taken_in(model)
    assert layers.count("relu6") == 35
    assert len(layers) - 35 == len(receipt.changes.left_alone)
