"""Batches of every form move to the device of the model, and the host does not wait for the device to copy them."""

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

from bnlab.observe.passes import placement
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.tensors import tensors_in

ON_META = nn.Linear(2, 2, device="meta")


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "a"


class Graph:
    """An object that moves itself to a device in place, as a graph does."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)
        return self


def x():
    return torch.randn(4, 2)


@pytest.mark.parametrize(
    "batch",
    [
        x(),
        (x(), [x(), {"mask": x()}]),
        Pair(x(), 3),
        {"x": x(), "name": ["a"]},
        UserDict(x=x()),
        Sample(x()),
        torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
    ],
    ids=["tensor", "nested containers", "named tuple", "dict", "encoding", "dataclass", "nested tensor"],
)
def test_every_form_moves_and_stays_what_it_is_and_the_batch_itself_does_not_change(batch):
    before = [tensor.device for tensor in tensors_in(batch)]
    (on_device,) = batches_of([batch], ON_META)
    assert type(on_device) is type(batch)
    assert {tensor.device.type for tensor in tensors_in(on_device)} == {"meta"}
    assert [tensor.device for tensor in tensors_in(batch)] == before


def test_a_graph_moves_as_a_copy():
    graph = Graph(x())
    (on_device,) = batches_of([graph], ON_META)
    assert (on_device.x.device.type, graph.x.device.type) == ("meta", "cpu")


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_packed_sequence_keeps_its_sizes_on_the_cpu(is_sorted):
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 4, 2)], enforce_sorted=is_sorted)
    (on_device,) = batches_of([packed], ON_META)
    assert type(on_device) is PackedSequence
    assert (on_device.data.device.type, on_device.batch_sizes.device.type) == ("meta", "cpu")
    assert (on_device.sorted_indices is None) == (packed.sorted_indices is None)


def test_a_model_without_one_device_places_its_input_itself():
    batch = x()
    both = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    for model in (nn.ReLU(), both):
        assert next(batches_of([batch], model)) is batch


class Copies:
    """Stands in for CUDA: notes how each tensor is copied to it, and copies it to the meta device."""

    def __init__(self, monkeypatch):
        self.pinned, self.to = [], []
        monkeypatch.setattr(placement, "_copies_in_background", lambda tensor, device: True)
        monkeypatch.setattr(placement, "_pinned_copy", self._pin)
        original = torch.Tensor.to

        def to(tensor, device, non_blocking=False):
            self.to.append((tensor, non_blocking))
            return original(tensor, device)

        monkeypatch.setattr(torch.Tensor, "to", to)

    def _pin(self, tensor):
        self.pinned.append(tensor)
        return tensor.clone()


def test_a_large_batch_is_copied_to_pinned_memory_and_from_there_in_the_background(monkeypatch):
    copies, large, small = Copies(monkeypatch), torch.randn(300, 100), torch.randn(3)
    list(batches_of([(large, small)], ON_META))
    assert [tensor is large for tensor in copies.pinned] == [True]
    (first, first_in_background), (second, second_in_background) = copies.to
    assert first_in_background
    assert second_in_background
    assert first is not large  # what the caller owns may be overwritten before the device has read it
    assert second is small


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_what_a_loader_has_pinned_is_not_copied_again(monkeypatch):
    copies, data = Copies(monkeypatch), torch.randn(300, 100)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    list(batches_of([data], ON_META))
    assert len(copies.pinned) == 1  # a tensor that the caller pinned may be filled again
    loader = DataLoader(data, batch_size=300)
    loader.pin_memory = True
    copies.pinned.clear()
    list(batches_of(loader, ON_META))
    assert copies.pinned == []


def test_only_an_ordinary_tensor_of_the_cpu_is_copied_to_cuda_in_the_background():
    class Image(torch.Tensor):
        pass

    cuda, cpu, dense = torch.device("cuda"), torch.device("cpu"), torch.randn(3, 3)
    copies = placement._copies_in_background
    assert copies(dense, cuda)
    assert not copies(dense, cpu)
    assert not copies(dense.to("meta"), cuda)
    assert not copies(dense.to_sparse(), cuda)
    assert not copies(dense.as_subclass(Image), cuda)


def test_a_machine_without_pinned_memory_gets_the_tensor_itself(monkeypatch):
    def refuse(*args, **keywords):
        raise RuntimeError("no pinned memory")

    monkeypatch.setattr(torch, "empty_like", refuse)
    tensor = x()
    assert placement._pinned_copy(tensor) is tensor
