"""The clocks: one for a GPU, which replays graphs, and one for a dry run on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from benchmarks.measuring.timing import CPU, Reading, Step, wall

__all__ = ["Clock", "CpuClock", "GpuClock", "Times"]

_WARM_UPS = 3
"""Calls before a capture. They compile kernels, choose algorithms and create state of the optimizer."""

_TIMES_THE_CACHE = 4
_LEAST_SCRATCH = 1 << 28


@dataclass(frozen=True)
class Times:
    """The readings of a side: median, smallest and largest seconds, and their number."""

    median: float
    smallest: float
    largest: float
    readings: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Return the summary of at least one reading."""
        return cls(median(seconds), min(seconds), max(seconds), len(seconds))

    @classmethod
    def of_sides(cls, seconds: Mapping[str, Sequence[float]]) -> dict[str, Times]:
        """Return the summary of each side."""
        return {side: cls.of(values) for side, values in seconds.items()}


class Clock(Protocol):
    """A way to time steps on a device."""

    def device_time(self, step: Step) -> Reading:
        """Return a reading of the time of the device alone: without Python and without launches."""

    def wall_time(self, step: Step, calls: int) -> Reading:
        """Return a reading of the wall time of a call, as a program sees it that makes several in a row."""


class GpuClock:
    """Times replays of CUDA graphs with a cold second-level cache.

    A graph holds all kernels of a step, so that neither Python nor a launch delays them. Before each replay the clock
    overwrites a buffer of several times the size of the cache: a layer of a network does not see its input there
    either, apart from what its producer wrote last.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(_TIMES_THE_CACHE * cache, _LEAST_SCRATCH)
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def device_time(self, step: Step) -> Reading:
        """Return a reading of one replay of a step, which is captured now."""
        graph = self._captured(step)

        def reading() -> float:
            self._scratch.zero_()
            self._start.record()
            graph.replay()
            self._end.record()
            self._end.synchronize()
            return 1e-3 * float(self._start.elapsed_time(self._end))

        reading()  # the first replay uploads the graph
        return reading

    def wall_time(self, step: Step, calls: int) -> Reading:
        """Return a reading of calls in a row, until the device has done their work."""
        return wall(step, calls=calls, device=self._device)

    def _captured(self, step: Step) -> torch.cuda.CUDAGraph:
        """Return the graph of a step, which runs on a stream of its own before."""
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # autograd warns of parameters that another stream used before
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        step()
                current.wait_stream(stream)
                with torch.cuda.graph(graph, stream=stream):
                    step()
        finally:
            torch.cuda.set_stream(current)  # torch leaves the other one current if a capture fails
        return graph


class CpuClock:
    """Runs each step once, for a dry run. Its readings are no times of a GPU, and nobody is shown them."""

    def device_time(self, step: Step) -> Reading:
        """Return a reading of one call."""
        return wall(step, device=CPU)

    def wall_time(self, step: Step, calls: int) -> Reading:
        """Return a reading of calls in a row."""
        return wall(step, calls=calls, device=CPU)
