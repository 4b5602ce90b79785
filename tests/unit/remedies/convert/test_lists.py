import ast

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies.convert.lists import is_list
from bnlab.remedies.convert.methods import Method, methods_that_call
from bnlab.remedies.refusal import Refusal


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(3))


def calls(forward, layers=None):
    block = type("Mine", (Block,), {"forward": forward, "__module__": __name__})()
    block.bns = block.bns if layers is None else layers
    methods_that_call(block, "bns", elements=True)
    return [ast.unparse(call) for call in Method(block, "forward", forward).calls_of("bns", elements=True)]


def directly(self, x):
    for bn in self.bns:
        x = F.relu(bn(x))
    return x


def side_by_side(self, x):
    for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
        x = bn(conv(x)) if i >= 0 else x
    return x


def counted(self, x):
    for i in range(len(self.bns)):
        x = self.bns[i](self.convs[i](x))
    return self.bns[-1](x)


def by_name(self, x):
    for i in range(len(self.convs)):
        bn = self.bns[i - 1]
        x = bn.forward(x)
        if isinstance(bn, nn.Identity) or bn is None or self.bns is None:
            return x
    return x


def two_loops(self, x):
    for bn in self.bns:
        x = bn(x)
    for bn in self.bns:
        x = bn(x)
    return x


CALLS = {
    directly: ["bn(x)"],
    side_by_side: ["bn(conv(x))"],
    counted: ["self.bns[i](self.convs[i](x))", "self.bns[-1](x)"],
    by_name: ["bn.forward(x)"],
    two_loops: ["bn(x)", "bn(x)"],
}


@pytest.mark.parametrize(("forward", "expected"), CALLS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_calls_of_an_element(forward, expected):
    assert sorted(calls(forward)) == sorted(expected)


def stops(self, x):
    for bn in self.bns:
        x = bn(x)
        if x.sum() > 0:
            break
    return x


def skips(self, x):
    for i, bn in enumerate(self.bns):
        if i == 1:
            continue
        x = bn(x)
    return x


def otherwise(self, x):
    for bn in self.bns:
        x = bn(x)
    else:
        x = -x
    return x


def passes_on(self, x):
    for bn in self.bns:
        x = torch.utils.checkpoint.checkpoint(bn, bn(x), use_reentrant=False)
    return x


def takes_parts(self, x):
    for bn in self.bns:
        x = bn.other(bn(x))
    return x


def backwards(self, x):
    for bn in reversed(self.bns):
        x = bn(self.bns[0](x))
    return x


def sliced(self, x):
    for bn in self.bns[1:]:
        x = bn(self.bns[0](x))
    return x


def all_at_once(self, x):
    return nn.Sequential(*self.bns)(self.bns[0](x))


def pairs(self, x):
    for pair in zip(self.convs, self.bns, strict=True):
        x = self.bns[0](pair[1](x))
    return x


def shifted(self, x):
    for bn, conv in zip(*(self.bns, self.convs), strict=True):
        x = self.bns[0](bn(conv(x)))
    return x


def another(self, x):
    for bn in self.bns:
        x = bn(x)
    bn = self.convs[0]
    return bn(x)


def imported(self, x):
    for bn in self.bns:
        x = bn(x)
    try:
        x = -x
    except ValueError as bn:
        x = bn
    return x


def argument(self, x, bn=None):
    x = bn(x)
    for bn in self.bns:
        x = bn(x)
    return x


def in_a_comprehension(self, x):
    return [bn(x) for bn in self.bns] + [self.bns[0](x)]


def whole(self, x):
    return self.bns(self.bns[0](x))


def computed(self, x):
    return self.bns[int(x.sum())](self.bns[0](x))


def own_zip(self, x):
    zip = lambda *lists: [(F.relu, F.relu)]  # noqa: E731
    for _, bn in zip(self.convs, self.bns):
        x = bn(self.bns[0](x))
    return x


def nothing(self, x):
    return x


ANOTHER_WAY = "its forward uses self.bns in another way than to call each element"
REFUSED = {
    stops: "its forward may leave the loop over the list early",
    skips: "its forward may leave the loop over the list early",
    otherwise: "its forward may leave the loop over the list early",
    passes_on: "its forward uses bn without calling it",
    takes_parts: "its forward uses bn without calling it",
    backwards: ANOTHER_WAY,
    sliced: ANOTHER_WAY,
    all_at_once: ANOTHER_WAY,
    pairs: ANOTHER_WAY,
    shifted: ANOTHER_WAY,
    in_a_comprehension: ANOTHER_WAY,
    whole: ANOTHER_WAY,
    computed: ANOTHER_WAY,
    own_zip: ANOTHER_WAY,
    another: "its forward sets bn to more than an element of the list",
    imported: "its forward sets bn to more than an element of the list",
    argument: "its forward sets bn to more than an element of the list",
    nothing: "its forward does not show a plain call of the layer",
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_any_other_use_of_a_list_is_refused(forward, reason):
    with pytest.raises(Refusal) as refusal:
        calls(forward)
    assert refusal.value.reason == reason


def test_a_sequential_is_taken_apart_by_numbers_only():
    def last(self, x):
        for bn in self.bns:
            x = bn(x)
        return self.bns[-1](x)

    layers = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    assert sorted(calls(last, layers)) == ["bn(x)", "self.bns[-1](x)"]
    with pytest.raises(Refusal, match=ANOTHER_WAY):  # a name may stand for a slice, which a Sequential can call
        calls(counted, layers)


class Reversed(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


def test_lists_of_modules():
    assert is_list(nn.ModuleList())
    assert is_list(nn.Sequential())
    assert not is_list(Reversed())
    assert not is_list(nn.ModuleDict())
