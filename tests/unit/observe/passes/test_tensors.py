"""The tensors of batches of every form."""

import collections
import dataclasses
from typing import NamedTuple

import torch

from bnlab.observe.passes.tensors import copy_of_batch, map_tensors, sequence_like, tensors_in, with_tensors


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    y: object


class Graph:
    """An object that moves itself to a device."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self

    def clone(self):
        return Graph(self.x.clone())


X, Y = torch.ones(2, 3), torch.zeros(2)


def test_tensors_in_order():
    assert tensors_in({"a": [X, (Y, Output(X))], "b": "text"}) == [X, Y, X]
    assert tensors_in(Graph(X)) == tensors_in(None) == tensors_in(Frozen) == []


def test_every_tensor_is_replaced_and_the_types_stay():
    graph = Graph(X)
    batch = {"pair": Pair(X, [Y, "text"]), "output": Output(X), "frozen": Frozen(Y), "graph": graph, "none": None}
    doubled = map_tensors(collections.OrderedDict(batch), lambda tensor: tensor * 2, lambda item: (item, "moved"))
    assert type(doubled) is collections.OrderedDict
    assert [type(part) for part in doubled.values()] == [Pair, Output, Frozen, tuple, type(None)]
    assert [tensor.sum().item() for tensor in tensors_in(doubled)] == [12.0, 0.0, 12.0, 0.0]
    assert doubled["pair"].y[1] == "text"
    assert doubled["graph"] == (graph, "moved")
    assert torch.equal(batch["output"].logits, torch.ones(2, 3))


def test_a_copy_shares_no_tensor_and_no_container():
    batch = [{"x": X}, Frozen(Y), Graph(X)]
    copied = copy_of_batch(batch)
    copied[0]["x"].fill_(7)
    copied[1].x.fill_(7)
    copied[2].x.fill_(7)
    assert [tensor.max().item() for tensor in (*tensors_in(batch), batch[2].x)] == [1.0, 0.0, 1.0]


def test_tensors_take_the_places_of_those_with_dimensions():
    scale, first, second = torch.tensor(3.0), torch.ones(1), torch.ones(4)
    x, (kept, y) = with_tensors((X, [scale, Y]), [first, second])
    assert (x is first, kept is scale, y is second) == (True, True, True)


def test_a_sequence_of_the_same_type():
    assert sequence_like(Pair(X, Y), [1, 2]) == Pair(1, 2)
    assert sequence_like([X], [1, 2]) == [1, 2]
    assert sequence_like((X,), [1, 2]) == (1, 2)
