"""The bandwidth of a copy, and the time of one small kernel: what the other figures are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.clock import Times
from benchmarks.gpu.stage import Case, Section, Stage

__all__ = ["BandwidthRow", "section"]

_COLUMNS = (("copy of, MB", 12), ("GB/s, read + written", 22), ("smallest kernel, us", 20))


@dataclass(frozen=True)
class BandwidthRow:
    """The times of a copy of so many bytes, and of a kernel that adds 1 to a number."""

    copied_bytes: int
    times: dict[str, Times]


def section() -> Section:
    """Return the section."""
    return Section("what the device does at best", _COLUMNS, lambda stage: [Case("copy", lambda: _measure(stage))], 5)


def _measure(stage: Stage) -> None:
    size = stage.sizes.copy
    source = torch.zeros(size, dtype=torch.int8, device=stage.device)
    target, number = torch.empty_like(source), torch.zeros((), device=stage.device)
    steps = {"copy": lambda: target.copy_(source), "smallest kernel": lambda: number.add_(1)}
    times = stage.timed({name: stage.clock.device_time(step) for name, step in steps.items()})
    stage.record.bandwidth = 2 * size / times["copy"].median
    stage.record.add("bandwidth", BandwidthRow(size, times))
    stage.output.row(_cells(size, stage.record.bandwidth, times["smallest kernel"], stage))


def _cells(size: int, bandwidth: float, smallest: Times, stage: Stage) -> Sequence[str]:
    figure = stage.output.figure
    return [f"{size / 1e6:.0f}", figure(bandwidth / 1e9, 0), figure(1e6 * smallest.median, 1)]
