"""The error of the output in train mode for inputs with large means, in both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import bnlab
from benchmarks.gpu.stage import Case, Section, Stage, attempted
from benchmarks.measuring.exact import LIMIT, RATIOS, error, exact, shifted
from benchmarks.measuring.steps import DTYPES, LAYOUTS, batch_norm

__all__ = ["AccuracyRow", "section"]

_LARGEST_RATIO = 1e4
_COLUMNS = (("dtype", -9), ("mean / std", 10), ("layout", -13), ("torch, eps", 12), ("bnlab, eps", 12))
_PACKAGES = {"torch": nn, "bnlab": bnlab.nn}


@dataclass(frozen=True)
class AccuracyRow:
    """The errors of both libraries in eps(dtype) * max(1, max|y|), for an input with a mean of `ratio` deviations."""

    dtype: str
    layout: str
    ratio: float
    errors: dict[str, float]


def section() -> Section:
    """Return the section."""
    title = f"largest error of the output in train mode, in eps * max(1, max|y|); bnlab must stay below {LIMIT:g}"
    return Section(title, _COLUMNS, lambda stage: list(_cases(stage)), seconds=5)


def _cases(stage: Stage) -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for ratio in RATIOS:
            if ratio <= _LARGEST_RATIO:
                yield Case(f"accuracy {dtype} {ratio:g}", partial(_measure, dtype, ratio, stage))


def _measure(dtype: str, ratio: float, stage: Stage) -> None:
    values = shifted(stage.sizes.accuracy, DTYPES[dtype], ratio)
    expected = exact(values)
    for layout, memory_format in LAYOUTS.items():
        x = values.to(stage.device).contiguous(memory_format=memory_format)

        def error_of(package: object, x: Tensor = x) -> float:
            layer = batch_norm(package, 4, x.size(1), device=stage.device)
            with torch.no_grad():
                return error(layer(x).cpu(), expected)

        makers: dict[str, Callable[[], float]] = {side: partial(error_of, own) for side, own in _PACKAGES.items()}
        errors, reasons = attempted(makers)
        stage.record.add("accuracy", AccuracyRow(dtype, layout, ratio, errors))
        stage.output.row([dtype, f"{ratio:g}", layout, *_texts(errors)])
        stage.fail(f"accuracy {dtype} {ratio:g} {layout}", reasons)


def _texts(errors: dict[str, float]) -> Sequence[str]:
    """Return the errors as text. They are no times, and a dry run shows them too."""
    return [f"{errors[side]:.3g}" if side in errors else "-" for side in _PACKAGES]
