"""The recomputation of the statistics of ResNet-50, beside torch's update_bn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import recalibrate
from benchmarks.gpu.stage import Case, Section, Stage
from benchmarks.gpu.training import TORCH
from benchmarks.measuring.resnet50 import network_for

__all__ = ["PEER", "RecalibrationRow", "section"]

PEER = "torch update_bn"
_DTYPES = {"float32": None, "bfloat16 autocast": torch.bfloat16}
_ROUNDS = 5
_COLUMNS = (
    *(("dtype", -22), ("side", -16), ("ms", 10), ("bnlab / it", 11)),
    *(("abs(d mean) / std", 18), ("abs(d var) / var", 17)),
)


@dataclass(frozen=True)
class RecalibrationRow:
    """The median seconds of a tool, and the largest errors of its statistics over all layers."""

    dtype: str
    side: str
    seconds: float
    mean_error: float
    var_error: float


def section() -> Section:
    """Return the section."""

    def cases(stage: Stage) -> Sequence[Case]:
        return [Case(f"recalibrate {name}", partial(_measure, name, stage)) for name in _DTYPES]

    return Section("recomputation of the statistics of ResNet-50, channels_last", _COLUMNS, cases, seconds=12)


def _measure(name: str, stage: Stage) -> None:
    batches, dtype = stage.images(stage.sizes.recalibration), _DTYPES[name]
    model = network_for(batches[0], TORCH, stage.sizes.blocks)
    with torch.autocast(stage.device.type, dtype, enabled=dtype is not None):
        rows = recalibrate.compare(model, batches, min(_ROUNDS, stage.repetitions))
    figure = stage.output.figure
    for side, row in rows.items():
        stage.record.add("recalibrate", RecalibrationRow(name, side, row.seconds, row.mean_error, row.var_error))
        ratio = None if side == "bnlab" else rows["bnlab"].seconds / row.seconds
        errors = [f"{row.mean_error:.1e}", f"{row.var_error:.1e}"]
        stage.output.row([name, side, figure(1e3 * row.seconds, 1), figure(ratio, 3), *errors])
