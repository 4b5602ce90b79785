import ast

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.observe.passes.executed_graph import execute
from bnlab.remedies.convert.followers import followers
from bnlab.remedies.convert.places import PlaceReader, is_sequence
from bnlab.remedies.refusal import Refusal


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act, self.drop = Inner(), nn.ReLU(), nn.Dropout(0.0)

    def forward(self, x):
        return self.act(self.drop(self.inner(x)))


def place(model, path):
    with torch.no_grad():
        graph = execute(model.eval(), torch.randn(4, 3))
    return PlaceReader(model).place(path, followers(graph, path), graph.of_layer(path)[0].modules)


def test_the_place_in_the_code_of_a_module_further_out():
    at = place(Outer(), "inner.bn")
    assert (at.container, at.activation, at.module, at.residual) == ("", "relu", "act", False)
    assert [flow.method.name for flow in at.flows] == ["forward"]


def test_the_place_in_a_sequence_further_out():
    model = nn.Sequential(nn.Sequential(Inner(), nn.Dropout(0.0)), nn.Identity(), nn.Tanh())
    at = place(model, "0.0.bn")
    assert (at.container, at.activation, at.module, at.flows) == ("", "tanh", "2", ())


class Shared(Outer):
    def __init__(self):
        super().__init__()
        self.alias = self.inner


class TwoWays(Outer):
    def forward(self, x):
        if x.shape[0] > 100:
            return self.act(self.inner(x))
        return self.inner(x).tanh()


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(2))

    def forward(self, x):
        for bn in self.bns:
            x = F.relu(bn(x))
        return x


class Directly(nn.Module):
    """Runs a Sequential without calling it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())])

    def forward(self, x):
        block = self.blocks[0]
        return block.forward(x)


def test_the_place_of_an_element_of_a_list():
    at = place(Listed(), "bns.1")
    assert (at.container, at.activation, at.element) == ("", "relu", "bns.1")
    assert [ast.unparse(flow.call) for flow in at.flows] == ["bn(x)"]


def test_the_place_in_an_element_whose_forward_is_called_directly():
    at = place(Directly(), "blocks.0.0")
    assert (at.container, at.activation, at.module, at.element) == ("blocks.0", "relu", "blocks.0.1", None)


class Picked(nn.Sequential):
    """One element of a list is the last thing that the module in front of the activation runs."""

    def __init__(self):
        super().__init__(Pick(), nn.ReLU())


class Pick(Listed):
    number = 0

    def forward(self, x):
        return self.bns[self.number](x)


class InPieces(nn.Module):
    """A Sequential in a list whose modules are run one by one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Pieces(nn.BatchNorm1d(3), nn.ReLU())])

    def forward(self, x):
        return self.layers[0].forward(x)


class Pieces(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Part(nn.Module):
    """Runs only a part of a Sequential for large batches."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))

    def forward(self, x):
        return self.layers[0][0](x) if x.shape[0] > 100 else self.layers(x)


class Returns(Inner):
    def forward(self, x):
        if x.shape[0] > 100:
            return -x
        return self.bn(x)


class OtherResults(Outer):
    """An activation behind a module that returns something else for large batches."""

    def __init__(self):
        super().__init__()
        self.inner = Returns()


class Helper(Inner):
    def forward(self, x):
        return -x if x.shape[0] > 100 else self.helper(x)

    def helper(self, x):
        return self.bn(x)


class Helped(Outer):
    def __init__(self):
        super().__init__()
        self.inner = Helper()


class Adds(Outer):
    def forward(self, x):
        return self.inner(x) + x


@pytest.mark.parametrize(
    ("model", "path", "reason"),
    [
        (Shared(), "inner.bn", "it is called from more than one place"),
        (OtherResults(), "inner.bn", "its forward returns other values too"),
        (Helped(), "inner.bn", "its helper returns its output"),
        (Part(), "layers.0.0", "its forward takes single modules out of self.layers"),
        (InPieces(), "layers.0.0", "the source code does not show how it is called"),
        (Picked(), "0.bns.0", "the element of a list returns its output"),
        (TwoWays(), "inner.bn", "different operations follow it on different paths through its forward"),
        (Adds(), "inner.bn", "the operation that follows it runs in another module"),
        (
            nn.Sequential(Inner(), nn.Sequential(nn.ReLU())), "0.bn",
            "the operation that follows it runs in another module",
        ),
    ],
)  # fmt: skip
def test_places_that_the_source_does_not_show(model, path, reason):
    with pytest.raises(Refusal) as refusal:
        place(model, path)
    assert refusal.value.reason == reason


def test_a_sequence_runs_its_modules_in_order():
    assert is_sequence(nn.Sequential())
    assert not is_sequence(type("Mine", (nn.Sequential,), {"forward": lambda self, x: x})())
    assert not is_sequence(nn.ModuleList())
