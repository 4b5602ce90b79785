"""The cost of a call: a forward and a backward pass of small tensors, which Python and launches dominate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import bnlab
from benchmarks.gpu.clock import Times
from benchmarks.gpu.stage import Case, Section, Stage, attempted
from benchmarks.measuring.steps import batch_norm, forward_and_backward
from benchmarks.measuring.timing import Step

__all__ = ["CallRow", "section"]

_PACKAGES = {"torch": nn, "bnlab": bnlab.nn}
_COLUMNS = (
    *(("shape", -18), ("torch, us", 11), ("bnlab, us", 11), ("bnlab/torch", 11)),
    *(("torch, device us", 18), ("bnlab, device us", 18)),
)


@dataclass(frozen=True)
class CallRow:
    """The wall times of a call on the host, and the times of the device alone, by side."""

    shape: tuple[int, ...]
    wall: dict[str, Times]
    device: dict[str, Times]

    @property
    def ratio(self) -> float | None:
        """The wall time of bnlab over that of torch."""
        if set(_PACKAGES) <= set(self.wall):
            return self.wall["bnlab"].median / self.wall["torch"].median
        return None


def section() -> Section:
    """Return the section."""
    title = "BN, float32, forward + backward of small tensors: wall time of a call, and time of the device alone"

    def cases(stage: Stage) -> Sequence[Case]:
        return [Case(f"call {shape}", partial(_measure, shape, stage)) for shape in stage.sizes.small]

    return Section(title, _COLUMNS, cases, seconds=4)


def _measure(shape: tuple[int, ...], stage: Stage) -> None:
    x, grad = (torch.randn(shape, device=stage.device) for _ in range(2))
    x.requires_grad_()

    def step_of(package: object) -> Step:
        layer = batch_norm(package, len(shape), shape[1], device=stage.device)
        step = forward_and_backward(layer, x, None, grad, list(layer.parameters()))
        step()
        return step

    steps, reasons = attempted({side: partial(step_of, package) for side, package in _PACKAGES.items()})
    clock, calls = stage.clock, stage.sizes.calls
    wall = stage.timed({side: clock.wall_time(step, calls) for side, step in steps.items()})
    readings, failed = attempted({side: partial(clock.device_time, step) for side, step in steps.items()})
    row = CallRow(shape, wall, stage.timed(readings))
    stage.record.add("calls", row)
    stage.output.row(_cells(row, stage))
    stage.fail(f"call {shape}", reasons | failed)


def _cells(row: CallRow, stage: Stage) -> list[str]:
    figure = stage.output.figure
    wall, device = (
        [figure(1e6 * times[side].median if side in times else None, 1) for side in _PACKAGES]
        for times in (row.wall, row.device)
    )
    return [str(row.shape), *wall, figure(row.ratio, 2), *device]
