import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies._rewritten import rewritten_class
from bnlab.remedies.convert.rewrite import fused_graph, traced
from bnlab.remedies.refusal import Refusal


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


class Looks(Block):
    def forward(self, x):
        if x.sum() > 0:
            return F.relu(self.bn(x))
        return x


class Pickled(Block):
    def __reduce__(self):
        return (Block, ())


def test_the_graph_loses_what_the_layer_takes_in():
    block = Block()
    graph = traced(block)
    assert fused_graph(block, graph, {"bn": False}) == {"bn": "relu"}
    block.__class__ = rewritten_class(Block, graph)
    x = torch.randn(4, 3)
    assert torch.equal(block(x), nn.BatchNorm1d(3)(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Looks, "its forward depends on x.sum"),
        (Pickled, "its class or instance has a __reduce__ of its own"),
    ],
)
def test_a_forward_that_is_not_sure_is_refused(kind, reason):
    with pytest.raises(Refusal, match=reason):
        traced(kind())


def test_a_forward_is_rewritten_once():
    block = Block()
    graph = traced(block)
    fused_graph(block, graph, {"bn": False})
    block.__class__ = rewritten_class(Block, graph)
    with pytest.raises(Refusal, match="its forward was rewritten before"):
        traced(block)


def test_an_addition_that_the_graph_does_not_show_is_refused():
    block = Block()
    with pytest.raises(Refusal, match="its forward does not show the addition"):
        fused_graph(block, traced(block), {"bn": True})
