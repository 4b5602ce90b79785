import copy
import pickle

import pytest
import torch
from tests.traces import differences, trace_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab
from bnlab.watching.class_forward import replaced_forward, replacement_of


class Doubling:
    def __init__(self, layer):
        self.layer = layer

    def run(self, forward, args, keywords):
        return 2 * forward(self.layer, *args, **keywords)


class OfSubclass(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bnlab.nn.BatchNorm1d, bnlab.nn.GhostBatchNorm1d, nn.SyncBatchNorm])
def test_the_forward_of_one_layer_is_another_one(kind):
    layer, other, x = kind(3).eval(), kind(3).eval(), torch.randn(5, 3)
    own = {base: vars(base).get("forward") for base in kind.__mro__}
    before = trace_of(layer)
    expected = layer(x)
    with replaced_forward([(layer, Doubling(layer))]):
        assert replacement_of(layer) is not None
        assert replacement_of(other) is None
        assert torch.equal(layer(x), 2 * expected)
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
        assert not differences(before, trace_of(layer))
    assert torch.equal(layer(x), expected)
    assert {base: vars(base).get("forward") for base in kind.__mro__} == own


def test_a_forward_that_calls_that_of_its_base_class_leads_to_a_second_call():
    layer, x = OfSubclass(3).eval(), torch.randn(5, 3)
    inner = layer(x) - 1
    with replaced_forward([(layer, Doubling(layer))]):
        assert torch.allclose(layer(x), 2 * (2 * inner + 1))


def test_blocks_end_in_any_order():
    layers = [nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3).eval()]
    own, x = _BatchNorm.forward, torch.randn(5, 3)
    blocks = [replaced_forward([(layer, Doubling(layer))]) for layer in layers]
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    assert replacement_of(layers[0]) is None
    assert torch.equal(layers[1](x), 2 * layers[0](x))
    blocks[1].__exit__(None, None, None)
    assert _BatchNorm.forward is own


def test_an_error_restores_the_class():
    layer, own = nn.BatchNorm1d(3), _BatchNorm.forward
    with pytest.raises(KeyboardInterrupt), replaced_forward([(layer, Doubling(layer))]):
        raise KeyboardInterrupt
    assert _BatchNorm.forward is own
    assert replacement_of(layer) is None
