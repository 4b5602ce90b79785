import pytest
import torch
from torch import nn

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


class Adds(Outer):
    def forward(self, x):
        return self.inner(x) + x


@pytest.mark.parametrize(
    ("model", "path", "reason"),
    [
        (Shared(), "inner.bn", "it is called from a list, or from more than one place"),
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
