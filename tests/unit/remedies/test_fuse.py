import contextlib
import copy
import pickle
import random

import pytest
import torch
from tests.architectures import ARCHITECTURES, BasicBlock, ResNet, build, images
from tests.unit.remedies.test_convert import assert_same, outputs, snapshot
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

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
def test_fused_networks_compute_the_same_and_undo(name):
    model, x = build(name).double(), images(8).double()
    keys, before, expected = [*model.state_dict()], snapshot(model), outputs(model, x)
    receipt = fuse(model, x)
    assert sorted(map(str, taken_in(model))) == sorted(map(str, TAKEN_IN[name]))
    assert [*model.state_dict()] == keys
    assert_close(outputs(model, x), expected, rtol=1e-8, atol=1e-9)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_what_a_resnet_takes_in():
    model = build("resnet")
    receipt = fuse(model, images(4))
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
        "  left alone: what it is added to is taken in by layer2.0.bn2 (layer2.0.downsample.1)"
    )
    assert isinstance(model.layer1[0], BasicBlock)
    assert model.layer1[0].expansion == 1
    assert type(model) is ResNet


def losses(model, steps=12):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(steps):
        x, labels = images(16).double(), torch.randint(10, (16,))
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_fused_resnet_trains_to_the_same_loss_curve():
    original = build("resnet").double()
    fused = copy.deepcopy(original)
    fuse(fused, images(4).double())
    expected = losses(original)
    assert losses(fused) == pytest.approx(expected, rel=1e-8)
    assert_close(fused.state_dict(), original.state_dict(), rtol=1e-7, atol=1e-8)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


def test_copies_pickles_compile_and_export():
    model, x = build("resnet"), images(4)
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
    """One BN layer, and what a test puts behind it."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.behind(self.bn(self.conv(x)), x)


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


def leaving_alone():  # noqa: C901 - a list of small classes
    class UsedTwice(Model):
        def behind(self, y, x):
            return self.relu(y) + y.mean()

    class Returned(Model):
        def behind(self, y, x):
            return {"features": y, "out": self.relu(y)}

    class KeptByTheModule(Model):
        def behind(self, y, x):
            self.seen = y
            return self.relu(y)

    class NothingKnown(Model):
        def behind(self, y, x):
            return y.abs()

    class OtherSlope(Model):
        def behind(self, y, x):
            return F.leaky_relu(y, 0.2)

    class Broadcast(Model):
        def behind(self, y, x):
            return y + torch.ones(1, 4, 1, 1)

    class AddedToItself(Model):
        def behind(self, y, x):
            return y + y

    class Scaled(Model):
        def behind(self, y, x):
            return torch.add(y, x.repeat(1, 2, 1, 1)[:, :4], alpha=2)

    class Constant(Model):
        def behind(self, y, x):
            return y + 1.0

    class Twice(Model):
        def behind(self, y, x):
            return self.bn(self.relu(y))

    class ByMode(Model):
        def behind(self, y, x):
            return F.relu(y) if self.training else F.relu6(y)

    class DropoutByMode(Model):
        def behind(self, y, x):
            return F.dropout(F.relu(y), 0.5, self.training)

    class Context(Model):
        def forward(self, x):
            with contextlib.nullcontext():
                return F.relu(self.bn(self.conv(x)))

    class Decorated(Model):
        @torch.enable_grad()
        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    class Random(Model):
        def behind(self, y, x):
            return F.relu(y) * (1 + 0 * random.random())

    class Counting(Model):
        calls = 0

        def behind(self, y, x):
            self.calls += 1
            return F.relu(y)

    class ByValue(Model):
        def behind(self, y, x):
            return F.relu(y) if x.sum() < 1e9 else y

    class Shared(Model):
        def behind(self, y, x):
            return self.relu(y) + self.relu(x).mean()

        def forward(self, x):
            return Inner.apply(self, x)

    class Inner:
        @staticmethod
        def apply(model, x):
            return model.behind(nn.Sequential(model.conv, model.bn)(x), x)

    class Wrapped(Model):
        def __init__(self):
            super().__init__()
            self.bn.register_forward_hook(lambda module, x, y: None)

        def behind(self, y, x):
            return self.relu(y)

    return {
        UsedTwice: "its output is used more than once, or returned",
        Returned: "its output is used more than once, or returned",
        KeptByTheModule: "its output is used more than once, or returned",
        NothingKnown: "no activation and no addition follows",
        OtherSlope: "no activation and no addition follows",
        Broadcast: "what is added to it has another shape or dtype",
        AddedToItself: "what is added to it is no other tensor",
        Scaled: "no activation and no addition follows",
        Constant: "what is added to it is no other tensor",
        Twice: "it ran 2 times in one forward pass",
        ByMode: "what follows it differs between train mode and eval mode",
        DropoutByMode: "its forward differs between train mode and eval mode",
        Context: "its forward has a with statement",
        Decorated: "its forward is wrapped",
        Random: "its forward draws random numbers in Python",
        Counting: "its forward sets calls",
        ByValue: (
            "its forward cannot be traced: symbolically traced variables cannot be used as inputs to control flow"
        ),
        Shared: "its forward cannot be traced: module is not installed as a submodule",
        Wrapped: "a hook looks at its output",
    }


@pytest.mark.parametrize(
    ("kind", "expected"), leaving_alone().items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_what_is_left_alone(kind, expected):
    assert reason(kind) == expected


def test_additions_from_either_side_and_with_nothing_behind():
    class Left(Model):
        def behind(self, y, x):
            return x.repeat(1, 2, 1, 1)[:, :4] + y

    class Right(Model):
        def behind(self, y, x):
            return torch.add(y, x.repeat(1, 2, 1, 1)[:, :4]).relu()

    for kind, activation in ((Left, None), (Right, "relu")):
        model, x = kind(), images(4)
        expected = copy.deepcopy(model)(x)
        receipt = fuse(model, x)
        assert "residual: - -> taken in (bn)" in str(receipt)
        assert model.bn.activation == activation
        assert_close(model(x), expected)


def test_an_activation_module_that_is_also_used_elsewhere_stays():
    class Elsewhere(Model):
        def behind(self, y, x):
            return self.relu(y).mean() + self.relu(x).mean()

    model, x = Elsewhere(), images(4)
    expected = copy.deepcopy(model)(x)
    fuse(model, x)
    assert (model.bn.activation, type(model.relu)) == ("relu", nn.ReLU)
    assert_close(model(x), expected)


def test_keyword_examples_and_nested_outputs():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, *, image, scale):
            return {"logits": [self.inner(image) * scale]}

    class Inner(Model):
        def behind(self, y, x):
            return F.relu(y)

    model, example = Keywords(), {"image": images(4), "scale": torch.tensor(2.0)}
    fuse(model, example)
    assert model.inner.bn.activation == "relu"


def test_a_fusion_that_is_not_equal_is_refused_and_taken_back(monkeypatch):
    from bnlab.remedies import _fuse

    model, x = build("resnet"), images(4)
    before = snapshot(model)
    monkeypatch.setattr(_fuse, "fused_graph", wrong_graph(_fuse.fused_graph))
    with pytest.raises(UsageError) as err:
        fuse(model, x)
    assert str(err.value).startswith("convert: the fused model must give the output in train mode it gave before, got")
    assert_same(snapshot(model), before)


def wrong_graph(right):
    def wrong(container, graph, layers):
        activations = right(container, graph, layers)
        return dict.fromkeys(activations, "sigmoid")

    return wrong


def test_a_model_that_raises_is_as_it_was():
    class Raises(Model):
        def behind(self, y, x):
            raise RuntimeError("no")

    model = Raises()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        fuse(model, images(4))
    assert_same(snapshot(model), before)


def test_fusing_leaves_modes_buffers_gradients_and_random_numbers_alone():
    model, x = build("mobilenet"), images(4)
    model.features[0].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fuse(model, x)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_residual_layers_of_half_precision():
    model, x = build("resnet").bfloat16(), images(4).bfloat16()
    fuse(model, x)
    assert taken_in(model).count("relu") == 9
