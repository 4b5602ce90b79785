import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.testing import assert_close

import bnlab
from bnlab.remedies.convert.flow import flows_of
from bnlab.remedies.convert.methods import methods_that_call
from bnlab.remedies.convert.rewrite import require_rewritable, rewritten
from bnlab.remedies.refusal import Refusal


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = bnlab.nn.BatchNorm1d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


class Pickled(Block):
    def __reduce__(self):
        return (Block, ())


class Elaborate(Block):
    """A forward with everything that a graph of one run does not show."""

    calls = 0
    shortcut = None

    def forward(self, x: "torch.Tensor", scale: float = 1.0, *, twice=False) -> "torch.Tensor":
        self.calls += 1
        for _ in range(2 if twice else 1):
            y = self.bn(x * scale)
            if self.shortcut is not None:
                x = self.shortcut(x)
            x = y + x
            x = F.relu(x)
        with torch.no_grad():
            self.last = x.mean()
        return x if x.shape[0] > 2 else -x


def rewrite(block):
    flows = [flow for method in methods_that_call(block, "bn") for flow in flows_of(method, "bn")]
    require_rewritable(block, [flow.method for flow in flows])
    block.__class__ = rewritten(block, flows)
    return flows


def test_the_forward_loses_what_the_layer_takes_in():
    block, x = Block(), torch.randn(4, 3)
    expected = block(x)
    rewrite(block)
    assert_close(block(x), nn.BatchNorm1d(3)(x))
    block.bn.activation = "relu"
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("keywords", [{}, {"scale": 2.0}, {"twice": True}])
def test_everything_else_stays(batch, keywords):
    block, twin, x = Elaborate(), Elaborate(), torch.randn(batch, 3)
    rewrite(block)
    block.bn.activation = "relu"
    for module in (block, pickle.loads(pickle.dumps(block))):
        twin.load_state_dict(module.state_dict())
        assert_close(module(x, **keywords), twin(x, **keywords))
        assert_close(module.bn.running_var, twin.bn.running_var)
    assert (block.calls, block.last) == (1, block.last)
    assert "self.bn(x * scale, x)" not in block._code
    assert "x = self.bn(y, x)" in block._code
    assert "self.shortcut(x)" in block._code


class Settled(Block):
    wide = False

    def forward(self, x):
        y = self.bn(x)
        if self.wide:
            y = torch.exp(y)
        return F.relu(y)


def test_a_condition_that_the_way_depends_on_gets_the_value_that_it_has():
    block, x = Settled(), torch.randn(4, 3)
    rewrite(block)
    assert "wide" not in block._code
    assert_close(block(x), nn.BatchNorm1d(3)(x))


def test_a_class_of_no_module_keeps_the_names_that_its_code_uses():
    names = {"nn": nn, "F": F, "__name__": "__main__", "Block": Block}
    function = types.FunctionType(Block.forward.__code__, names)
    kind = type("Mine", (Block,), {"forward": function, "__module__": __name__})
    block, x = kind(), torch.randn(4, 3)
    expected = block(x)
    rewrite(block)
    block.bn.activation = "relu"
    assert torch.equal(block(x), expected)
    assert set(block._names) == {"F"}


def test_a_class_of_no_module_whose_names_cannot_be_kept_is_refused():
    names = {"F": {"relu": F.relu}, "__name__": "__main__", "Block": Block}
    kind = type(
        "Mine", (Block,), {"forward": types.FunctionType(Other.forward.__code__, names), "__module__": __name__}
    )
    with pytest.raises(Refusal, match="its forward uses values that the rewritten class cannot keep"):
        rewrite(kind())


class Other(Block):
    def forward(self, x):
        x = self.bn(x)
        return x.relu() * len(F)


def test_a_class_that_reduces_itself_is_refused():
    with pytest.raises(Refusal, match="its class or instance has a __reduce__ of its own"):
        rewrite(Pickled())


def test_a_forward_is_rewritten_once():
    block = Block()
    rewrite(block)
    with pytest.raises(Refusal, match="its forward was rewritten before"):
        rewrite(block)
