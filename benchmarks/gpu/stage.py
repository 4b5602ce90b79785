"""What every section gets: the device and its clock, the sizes, the time that is left, the output and the record."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock, CpuClock, GpuClock, Times
from benchmarks.gpu.record import Record
from benchmarks.gpu.table import Output
from benchmarks.measuring.resnet50 import BLOCKS, BN_ACTIVATIONS
from benchmarks.measuring.steps import SMALL_SHAPES, Forward, compiled
from benchmarks.measuring.timing import CPU, Reading, alternating
from bnlab.wording import error_line

__all__ = ["FULL", "TINY", "Budget", "Case", "Section", "Sizes", "Stage", "attempted", "stage_of"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sizes:
    """The sizes of everything that is measured.

    Attributes:
        batches: The batch sizes of the layers.
        activations: The channels and the side of their inputs.
        copy: The bytes of the tensor whose copy shows the bandwidth.
        images: The shape of a batch of the training step.
        blocks: The bottlenecks in each stage of the network.
        recalibration: The number of batches, of the shape of `images`, that statistics are recomputed from.
        check: The number of batches of a diagnosis.
        accuracy: The shape of the input whose output is compared with the exact one.
        small: The shapes of small tensors.
        calls: The number of calls in one reading of a small tensor.
        steps: The number of training steps in one reading.
    """

    batches: tuple[int, ...] = (32, 128)
    activations: tuple[tuple[int, int], ...] = BN_ACTIVATIONS
    copy: int = 1 << 30
    images: tuple[int, int, int, int] = (64, 3, 224, 224)
    blocks: tuple[int, ...] = BLOCKS
    recalibration: int = 8
    check: int = 4
    accuracy: tuple[int, int, int, int] = (32, 64, 56, 56)
    small: tuple[tuple[int, ...], ...] = (*SMALL_SHAPES, (32, 64, 14, 14))
    calls: int = 200
    steps: int = 5


FULL = Sizes()
TINY = Sizes(
    batches=(2,),
    activations=((3, 4), (2, 7)),
    copy=1 << 10,
    images=(2, 3, 32, 32),
    blocks=(1,),
    recalibration=2,
    check=2,
    accuracy=(4, 2, 4, 4),
    small=((6, 3), (2, 3, 2, 2)),
    calls=1,
    steps=1,
)
"""The sizes of a dry run."""


class Budget:
    """The time that the command may take, from its start."""

    def __init__(self, seconds: float, started: float) -> None:
        self._end = started + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()


class Case(NamedTuple):
    """One row of a section: its name, and the function that measures, prints and records it."""

    name: str
    measure: Callable[[], None]


class Section(NamedTuple):
    """A section of the benchmark.

    Attributes:
        title: The title of its table.
        columns: The names and widths of the columns. A width below 0 aligns to the left.
        cases: A function that returns the rows to measure, in the order of their importance.
        seconds: About how long the first row takes on an H100 that has compiled nothing yet.
    """

    title: str
    columns: Sequence[tuple[str, int]]
    cases: Callable[[Stage], Sequence[Case]]
    seconds: float


@dataclass
class Stage:
    """What every section gets.

    Attributes:
        device: The device.
        clock: Its clock.
        sizes: The sizes of everything.
        repetitions: The number of readings of each side.
        output: What prints.
        record: What becomes the JSON file.
        is_dry: Whether this is a dry run, in which nothing is compiled and no time is shown.
    """

    device: torch.device
    clock: Clock
    sizes: Sizes
    repetitions: int
    output: Output
    record: Record
    is_dry: bool

    def compiled(self, forward: Forward) -> Forward:
        """Return a function that torch.compile compiles for one shape; the function itself in a dry run."""
        return forward if self.is_dry else compiled(forward)

    def images(self, count: int) -> list[Tensor]:
        """Return batches of random images in channels_last."""
        torch.manual_seed(0)
        shape, layout = self.sizes.images, torch.channels_last
        return [torch.randn(shape, device=self.device).contiguous(memory_format=layout) for _ in range(count)]

    def timed(self, readings: Mapping[str, Reading]) -> dict[str, Times]:
        """Return the times of each side. The sides take turns."""
        return Times.of_sides(alternating(readings, self.repetitions))

    def fail(self, name: str, reasons: Mapping[str, str]) -> None:
        """Print and record why sides of a row have no figures."""
        for side, reason in reasons.items():
            self.record.failures.append({"row": name, "side": side, "reason": reason})
            self.output.line(f"    {side} failed: {reason}")

    def release(self) -> None:
        """Return the memory of graphs and tensors that nobody uses any more to the device."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def stage_of(*, is_dry: bool, repetitions: int, record: Record) -> Stage:
    """Return the stage for the GPU, or for a dry run on the CPU."""
    if is_dry:
        return Stage(CPU, CpuClock(), TINY, repetitions, Output(is_dry=True), record, is_dry=True)
    device = torch.device("cuda", torch.cuda.current_device())
    return Stage(device, GpuClock(device), FULL, repetitions, Output(is_dry=False), record, is_dry=False)


def attempted(makers: Mapping[str, Callable[[], Result]]) -> tuple[dict[str, Result], dict[str, str]]:
    """Return the result of each function that ends, and the error of each that raises one: both are results."""
    results: dict[str, Result] = {}
    reasons: dict[str, str] = {}
    for side, make in makers.items():
        try:
            results[side] = make()
        except Exception as error:  # noqa: PERF203 - one side must not end the others
            reasons[side] = error_line(error)
    return results, reasons
