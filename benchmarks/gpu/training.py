"""A training step of ResNet-50 in bfloat16: time, time of the device alone, and peak memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import Times
from benchmarks.gpu.stage import Case, Section, Stage, attempted
from benchmarks.measuring.resnet50 import SIDES, network_for, training_step
from benchmarks.measuring.timing import Step, synchronize

__all__ = ["COMPILED", "FUSED", "TORCH", "TrainingRow", "section", "step_of"]

TORCH, FUSED = SIDES[0], SIDES[2]
COMPILED = "torch, compiled"
_ORDER = (TORCH, FUSED, SIDES[1], COMPILED)
_WARM_UPS = 3
_COLUMNS = (
    *(("side", -16), ("step, ms", 10), ("/ torch", 8), ("device alone, ms", 17), ("/ torch", 8)),
    *(("peak, MB", 10), ("/ torch", 8)),
)


@dataclass(frozen=True)
class TrainingRow:
    """The figures of one side.

    Attributes:
        side: The side.
        wall: The wall time of a step, of several in a row.
        device: The time of the device alone, in a CUDA graph.
        peak_bytes: The largest allocation in a step, with parameters and state of the optimizer; None on a CPU.
    """

    side: str
    wall: Times | None
    device: Times | None
    peak_bytes: int | None


def section() -> Section:
    """Return the section."""
    title = "a training step of ResNet-50: bfloat16 autocast, channels_last, SGD"
    return Section(title, _COLUMNS, lambda stage: [Case("training step", lambda: _measure(stage))], seconds=35)


def _compiled_step(stage: Stage, x: Tensor) -> Step:
    """Return a step of the compiled network with torch's layers, not yet compiled."""
    model = network_for(x, TORCH, stage.sizes.blocks)
    if not stage.is_dry:
        torch.compiler.reset()
        model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return training_step(model, x, torch.bfloat16)


def _measure(stage: Stage) -> None:
    x, *_ = stage.images(1)
    with _chosen_algorithms():
        step_of(TORCH, stage, x)  # takes the workspaces that stay
        stage.release()
        made, reasons = attempted({side: partial(_step_and_peak, side, stage, x) for side in _ORDER})
        steps = {side: step for side, (step, _) in made.items()}
        wall = stage.timed({side: stage.clock.wall_time(step, stage.sizes.steps) for side, step in steps.items()})
        readings, failed = attempted({side: partial(stage.clock.device_time, step) for side, step in steps.items()})
        device = stage.timed(readings)
    rows = [TrainingRow(side, wall[side], device.get(side), made[side][1]) for side in _ORDER if side in made]
    for row in rows:
        stage.record.add("training", row)
        stage.output.row(_cells(row, rows[0], stage))
    stage.fail("training step", reasons | failed)


@contextlib.contextmanager
def _chosen_algorithms() -> Iterator[None]:
    """Let cuDNN choose its convolutions by trying them, as for a training run."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def step_of(side: str, stage: Stage, x: Tensor) -> Step:
    """Return a training step of a side that has run a few times."""
    if side == COMPILED:
        step = _compiled_step(stage, x)
    else:
        step = training_step(network_for(x, side, stage.sizes.blocks), x, torch.bfloat16)
    for _ in range(1 if stage.is_dry else _WARM_UPS):
        step()
    return step


def _step_and_peak(side: str, stage: Stage, x: Tensor) -> tuple[Step, int | None]:
    """Return a step that is warm, and the largest allocation in it above what other sides hold."""
    if stage.device.type != "cuda":
        return step_of(side, stage, x), None
    synchronize(stage.device)
    before = torch.cuda.memory_allocated(stage.device)
    step = step_of(side, stage, x)
    torch.cuda.reset_peak_memory_stats(stage.device)
    step()
    synchronize(stage.device)
    return step, torch.cuda.max_memory_allocated(stage.device) - before


def _cells(row: TrainingRow, reference: TrainingRow, stage: Stage) -> list[str]:
    figure = stage.output.figure
    cells = [row.side]
    for own, other, digits in zip(_figures(row), _figures(reference), (2, 2, 0), strict=True):
        is_comparable = own is not None and other is not None and reference.side == TORCH
        cells += [figure(own, digits), figure(own / other if is_comparable else None, 3)]  # type: ignore[operator]
    return cells


def _figures(row: TrainingRow) -> list[float | None]:
    """Return the milliseconds of a step, those of the device alone, and the megabytes."""
    times = [None if times is None else 1e3 * times.median for times in (row.wall, row.device)]
    return [*times, None if row.peak_bytes is None else row.peak_bytes / 1e6]
