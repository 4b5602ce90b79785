"""How the benchmarks time the sides of a comparison, and how they combine the figures."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = [
    "CPU",
    "Reading",
    "Step",
    "alternating",
    "geometric_mean",
    "medians",
    "restart_with",
    "seconds_of",
    "synchronize",
    "wall",
]

CPU = torch.device("cpu")

Step = Callable[[], object]
"""The work that is timed."""

Reading = Callable[[], float]
"""A function that runs a step and returns the seconds that it takes."""


def restart_with(environment: Mapping[str, str], script: str) -> None:
    """Run a script again in place of this process, unless the environment has these variables already."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, script, *sys.argv[1:]], {**os.environ, **environment})


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work. A CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(step: Step, *, calls: int = 1, device: torch.device = CPU) -> float:
    """Return the wall seconds of a call, as the mean of several. The device is idle before and after them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def wall(step: Step, *, calls: int = 1, device: torch.device = CPU) -> Reading:
    """Return a reading of the wall seconds of a call, after an untimed call of the same step."""

    def reading() -> float:
        step()
        return seconds_of(step, calls=calls, device=device)

    return reading


def alternating(readings: Mapping[str, Reading], repetitions: int) -> dict[str, list[float]]:
    """Return the readings of each side. The sides take turns, so that a change of the machine meets all of them."""
    seconds: dict[str, list[float]] = {side: [] for side in readings}
    for _ in range(repetitions):
        for side, reading in readings.items():
            seconds[side].append(reading())
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side."""
    return {side: statistics.median(values) for side, values in seconds.items()}


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean of at least one ratio."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
