"""Many tensors move between a device and the host in one copy, and results wait on a device in their order."""

import torch
from tests.host_reads import as_on_a_device, host_reads

from bnlab.observe.transfers import Pending, to_device, to_host


def test_the_host_reads_once_for_each_dtype_and_gets_every_shape_and_value(monkeypatch):
    tensors = [torch.randn(3), torch.arange(6).view(2, 3), torch.tensor(7.0), torch.randn(2, 2).t(), torch.empty(0)]
    as_on_a_device(monkeypatch)
    with host_reads() as reads:
        read = to_host(tensors)
    assert sum(reads.values()) == 2
    for tensor, value in zip(tensors, read, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.dtype == value.dtype


def test_what_is_at_hand_is_not_copied():
    tensor = torch.randn(3)
    assert to_host([tensor])[0] is tensor
    assert to_device([tensor], [torch.device("cpu")])[0] is tensor


def test_tensors_go_to_the_device_of_each():
    tensors = [torch.randn(3), torch.randn(2, 2), torch.arange(4)]
    devices = [torch.device("meta"), torch.device("cpu"), torch.device("meta")]
    on_device = to_device(tensors, devices)
    assert [one.device for one in on_device] == devices
    assert [one.shape for one in on_device] == [one.shape for one in tensors]
    assert on_device[1] is tensors[1]


def test_results_at_hand_are_used_at_once_and_those_of_a_device_in_order(monkeypatch):
    used = []
    pending = Pending()
    pending.add([torch.ones(1)], lambda values: used.append(values[0].sum()))
    assert (used, pending.is_empty) == ([1], True)
    as_on_a_device(monkeypatch)
    pending.add([torch.full((2,), 2.0), torch.zeros(1)], lambda values: used.append(values[0].sum()))
    pending.add([], lambda values: used.append(values))
    assert (used, pending.is_empty, pending.is_large) == ([1], False, False)
    pending.settle()
    assert used == [1, 4, []]
    assert pending.is_empty


def test_results_that_take_much_memory_are_large(monkeypatch):
    as_on_a_device(monkeypatch)
    pending = Pending()
    for _ in range(3):
        assert not pending.is_large
        pending.add([torch.empty(3_000_000, dtype=torch.float64)], lambda values: None)
    assert pending.is_large
    pending.settle()
    assert not pending.is_large
