"""Counters for programs that wait for each other, on the CPU with the streams of a GPU replaced."""

import threading
from types import SimpleNamespace

import pytest
import torch

from bnlab.kernels.backends.triton import workspace
from bnlab.kernels.backends.triton.workspace import counters

GPU = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch):
    """The current stream of a GPU: its number, and whether it is captured. The counters lie on the CPU."""
    current = SimpleNamespace(cuda_stream=1, capturing=False, awaited=[], threads=[])
    current.wait_stream = current.awaited.append
    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: current.capturing,
        current_stream=lambda device: current,
        default_stream=lambda device: f"default stream of {device}",
    )

    def zeros(number, dtype, device):
        current.threads.append(threading.get_ident())
        return torch.zeros(number, dtype=dtype)

    replaced = SimpleNamespace(int32=torch.int32, cuda=cuda, zeros=zeros)
    monkeypatch.setattr(workspace, "torch", replaced)
    monkeypatch.setattr(workspace, "_COUNTERS", {})
    return current


@pytest.mark.parametrize("number", [1, 33])
def test_elsewhere_every_launch_has_its_own(number):
    zeros = counters(torch.device("cpu"), number)
    assert (zeros.dtype, zeros.tolist()) == (torch.int32, [0] * number)
    assert counters(torch.device("cpu"), number) is not zeros


def test_launches_on_a_stream_share_their_counters(stream):
    first = counters(GPU, 3)
    assert counters(GPU, first.numel()) is first
    assert not first.any()


def test_more_counters_than_before_are_new_zeros(stream):
    first = counters(GPU, 3)
    more = counters(GPU, first.numel() + 1)
    assert more.numel() > first.numel()
    assert counters(GPU, 3) is more


def test_lasting_counters_come_from_a_thread_without_a_pool_and_their_stream_waits(stream):
    counters(GPU, 3)
    counters(GPU, 3)
    assert stream.awaited == ["default stream of cuda:0"]
    assert len(stream.threads) == 1
    assert stream.threads != [threading.get_ident()]


def test_counters_that_a_queued_launch_may_use_are_never_freed(stream):
    first = counters(GPU, 3)
    counters(GPU, first.numel() + 1)
    assert any(kept is first for kept in workspace._COUNTERS[GPU, 1])


def test_another_stream_or_device_has_its_own(stream):
    first = counters(GPU, 3)
    assert counters(torch.device("cuda", 1), 3) is not first
    stream.cuda_stream = 2
    assert counters(GPU, 3) is not first
    stream.cuda_stream = 1
    assert counters(GPU, 3) is first


def test_a_graph_has_its_own_and_leaves_none_behind(stream):
    first = counters(GPU, 3)
    stream.capturing = True
    captured = [counters(GPU, 3), counters(GPU, 3)]
    assert captured[0] is not captured[1]
    assert all(zeros is not first and zeros.tolist() == [0, 0, 0] for zeros in captured)
    stream.capturing = False
    assert counters(GPU, 3) is first
