"""The diagnosis of ResNet-50 without a metric, beside a forward pass and torch's update_bn on the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnlab
from benchmarks.gpu.clock import Times
from benchmarks.gpu.recalibrate import PEER
from benchmarks.gpu.stage import Case, Section, Stage, attempted
from benchmarks.gpu.training import TORCH
from benchmarks.measuring.resnet50 import network_for
from benchmarks.measuring.timing import Reading, Step, alternating, seconds_of

__all__ = ["CheckRow", "section"]

_COLUMNS = (("side", -22), ("ms", 10), ("/ update_bn", 12))
_ROUNDS = 2


@dataclass(frozen=True)
class CheckRow:
    """The wall times of one side."""

    side: str
    times: Times


def section() -> Section:
    """Return the section."""
    title = "bnlab.check(model, data=batches) of ResNet-50, float32, channels_last"
    return Section(title, _COLUMNS, lambda stage: [Case("check", lambda: _measure(stage))], seconds=15)


def _measure(stage: Stage) -> None:
    data = stage.images(stage.sizes.check)
    model = network_for(data[0], TORCH, stage.sizes.blocks)
    bnlab.recalibrate(model, data)
    steps: dict[str, Step] = {
        PEER: lambda: update_bn(data, model.train()),
        "a forward pass": lambda: _forward(model.eval(), data),
        "bnlab.check": lambda: bnlab.check(model.eval(), data=data),
    }

    def warm_reading(side: str) -> Reading:
        steps[side]()
        return partial(seconds_of, steps[side], device=stage.device)

    readings, reasons = attempted({side: partial(warm_reading, side) for side in steps})
    times = Times.of_sides(alternating(readings, min(_ROUNDS, stage.repetitions)))
    for side, own in times.items():
        stage.record.add("check", CheckRow(side, own))
        ratio = own.median / times[PEER].median if PEER in times else None
        stage.output.row([side, stage.output.figure(1e3 * own.median, 1), stage.output.figure(ratio, 2)])
    stage.fail("check", reasons)


def _forward(model: nn.Module, data: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in data:
            model(batch)
