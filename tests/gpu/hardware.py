"""What a test asks of the GPU itself: captured graphs, forbidden waiting, counted waiting, peak memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_SYNCHRONISES = "called a synchronizing CUDA operation"
"""What torch warns of in the debug mode "warn"."""


def captured(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture what a function launches, after three runs to warm up, and return what replays it."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the CPU waits for the GPU."""
    with _debugging("error"):
        yield


def waits(function: Callable[[], object]) -> int:
    """Return how often the CPU waits for the GPU in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _debugging("warn"):
            function()
    return sum(_SYNCHRONISES in str(warning.message) for warning in caught)


@contextmanager
def _debugging(mode: str) -> Iterator[None]:
    _set(mode)
    try:
        yield
    finally:
        _set("default")


def _set(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not notice every wait
        torch.cuda.set_sync_debug_mode(mode)


def peak(function: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes a call raises the allocated memory at its highest point."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: torch.device) -> int:
    """Return how many bytes can be allocated."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def busy(device: torch.device, products: int = 20, size: int = 4096) -> torch.cuda.Stream:
    """Return a stream on which products of matrices occupy the GPU."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16)
        for _ in range(products):
            matrix = (matrix @ matrix) * 0
    return stream


def wait(device: torch.device) -> None:
    """Wait until the GPU has nothing left to do."""
    torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Return how many bytes are allocated."""
    return torch.cuda.memory_allocated(device)
