"""BN with a ReLU, and with a residual, in train mode: the activations of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bnlab
from benchmarks.gpu.clock import Times
from benchmarks.gpu.stage import Case, Section, Sizes, Stage, attempted
from benchmarks.measuring.steps import (
    DTYPES,
    LAYOUTS,
    Forward,
    batch_norm,
    forward_and_backward,
    torch_forward,
)
from benchmarks.measuring.timing import Reading, Step

__all__ = [
    "LAYERS",
    "PASSES",
    "SIDES",
    "LayerCase",
    "LayerRow",
    "forward_of",
    "inputs_of",
    "layer_cases",
    "section",
    "traffic",
]

SIDES = ("eager", "compile", "bnlab")
PASSES = ("forward", "forward + backward")

LAYERS = {
    "relu-bfloat16": (False, "bfloat16"),
    "residual-bfloat16": (True, "bfloat16"),
    "relu-float32": (False, "float32"),
    "residual-float32": (True, "float32"),
}
"""The sections of layers: whether there is a residual, and the dtype of the input."""

DIFFERENCES = {"float32": 0.01, "bfloat16": 0.1}
"""The largest difference of the gradients from those of torch eager, as a share of their size, that is no failure.

A ReLU passes or stops a whole gradient, so where two sides round an output near 0 to different signs, a gradient
differs by all of its size. In bfloat16 torch eager rounds before it adds the residual, which flips about one sign in
five hundred. The comparison only shows a side that computes something else: tests compare with exact results.
"""

_NAMES = {"contiguous": "nchw", "channels_last": "nhwc"}


class LayerCase(NamedTuple):
    """A layer and its input. `shape` is (N, C, H, W)."""

    residual: bool
    dtype: str
    layout: str
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """Such as "BN + ReLU bfloat16 32,64,112,112 nhwc"."""
        layer = "BN + add + ReLU" if self.residual else "BN + ReLU"
        return f"{layer} {self.dtype} {self.label}"

    @property
    def label(self) -> str:
        """Such as "32,64,112,112 nhwc"."""
        return f"{','.join(map(str, self.shape))} {_NAMES[self.layout]}"

    @property
    def bytes(self) -> int:
        """The size of one activation."""
        size = DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class LayerRow:
    """The figures of a layer.

    Attributes:
        residual: Whether a residual is added before the ReLU.
        dtype: The dtype of the input. Parameters and statistics are float32.
        layout: The layout of the input.
        shape: Its shape (N, C, H, W).
        activation_bytes: The bytes of the input.
        times: The times by pass and side.
        difference: The difference of the gradients of bnlab from those of torch eager, as a share of their size.
    """

    residual: bool
    dtype: str
    layout: str
    shape: tuple[int, ...]
    activation_bytes: int
    times: dict[str, dict[str, Times]]
    difference: float | None

    def ratio(self, side: str, which: str = PASSES[1]) -> float | None:
        """Return the time of a side over that of bnlab; None if one of them failed."""
        times = self.times.get(which, {})
        return times[side].median / times["bnlab"].median if {side, "bnlab"} <= set(times) else None

    def share_of_copy(self, bandwidth: float | None, which: str, *, in_one_launch: bool) -> float | None:
        """Return the traffic of bnlab's layer per second, as a share of that of a copy."""
        times = self.times.get(which, {})
        if bandwidth is None or "bnlab" not in times:
            return None
        size = traffic(which, self.residual, in_one_launch=in_one_launch) * self.activation_bytes
        return size / times["bnlab"].median / bandwidth


def traffic(which: str, residual: bool, *, in_one_launch: bool) -> int:
    """Return how many activations a layer moves at least through the memory of the device.

    Forward, it reads x for the statistics and writes y. Backward, it reads x and dy for the sums and writes dx. In one
    launch the tiles stay on chip for the second half. In two launches each half reads x, and dy, again. A residual is
    read once and its gradient written once, which the second launch reads in place of dy; its mask of one bit for each
    element is not counted.
    """
    forward = (2 if in_one_launch else 3) + residual
    return forward if which == PASSES[0] else forward + (3 if in_one_launch else 5) + residual


def layer_cases(sizes: Sizes, name: str) -> Iterator[LayerCase]:
    """Yield the cases of a section, the smaller batch first, with both layouts of an input one after the other."""
    residual, dtype = LAYERS[name]
    for batch in sizes.batches:
        for channels, side in sizes.activations:
            for layout in LAYOUTS:
                yield LayerCase(residual, dtype, layout, (batch, channels, side, side))


def section(name: str) -> Section:
    """Return a section of `LAYERS`."""
    residual, dtype = LAYERS[name]
    columns = [("N,C,H,W", -22)]
    columns += [(f"{side}, us", 15) for side in SIDES]
    columns += [("eager/bnlab", 11), ("compile/bnlab", 13), ("MB moved", 21), ("share of copy", 25)]
    one, two = (
        " / ".join(f"{traffic(which, residual, in_one_launch=in_one_launch)}A" for which in PASSES)
        for in_one_launch in (True, False)
    )
    title = (
        f"BN + {'add + ' if residual else ''}ReLU, {dtype}, train mode: forward / forward + backward. MB moved and "
        f"share of the copy's bandwidth: {one} (one launch) | {two} (two)"
    )

    def cases(stage: Stage) -> Sequence[Case]:
        return [Case(case.name, partial(_measure, case, name, stage)) for case in layer_cases(stage.sizes, name)]

    return Section(title, columns, cases, seconds=15)


class Inputs(NamedTuple):
    """The tensors of a step: input and residual need gradients, `grad` is that of the output."""

    x: Tensor
    residual: Tensor | None
    grad: Tensor


def inputs_of(case: LayerCase, device: torch.device) -> Inputs:
    """Return random inputs of a case."""
    torch.manual_seed(0)
    x, grad, other = (
        torch.randn(case.shape, device=device).to(DTYPES[case.dtype]).contiguous(memory_format=LAYOUTS[case.layout])
        for _ in range(3)
    )
    return Inputs(x.requires_grad_(), other.requires_grad_() if case.residual else None, grad)


def forward_of(side: str, case: LayerCase, stage: Stage) -> tuple[Forward, list[nn.Parameter]]:
    """Return the forward pass of a side and the parameters of its layer."""
    channels = case.shape[1]
    if side == "bnlab":
        own = batch_norm(bnlab.nn, 4, channels, activation="relu", device=stage.device)
        return own, list(own.parameters())
    layer = batch_norm(nn, 4, channels, device=stage.device)
    forward = torch_forward(layer, activation="relu", in_place=side == "eager")
    return stage.compiled(forward) if side == "compile" else forward, list(layer.parameters())


def _measure(case: LayerCase, name: str, stage: Stage) -> None:
    x, residual, grad = inputs_of(case, stage.device)
    inputs = (x,) if residual is None else (x, residual)

    def steps(side: str) -> dict[str, Step]:
        forward, parameters = forward_of(side, case, stage)
        both = forward_and_backward(forward, x, residual, grad, parameters)
        both()
        return {PASSES[0]: lambda: forward(*inputs), PASSES[1]: both}

    def reading(side: str, which: str) -> Reading:
        return stage.clock.device_time(ready[side][which])

    ready, reasons = attempted({side: partial(steps, side) for side in SIDES})
    times: dict[str, dict[str, Times]] = {}
    for which in PASSES:
        readings, failed = attempted({side: partial(reading, side, which) for side in ready})
        times[which] = stage.timed(readings)
        reasons |= {f"{side} {which}": reason for side, reason in failed.items()}
        del readings  # and with them the graphs
    difference = _difference(ready)
    if difference is not None and not difference <= DIFFERENCES[case.dtype]:
        reasons["bnlab"] = f"its gradients differ from those of torch eager by {difference:.3g} of their size"
    row = LayerRow(case.residual, case.dtype, case.layout, case.shape, case.bytes, times, difference)
    stage.record.add(name, row)
    stage.output.row(_cells(case, row, stage))
    stage.fail(case.name, reasons)


def _difference(steps: dict[str, dict[str, Callable[[], object]]]) -> float | None:
    """Return how much the gradients of bnlab differ from those of torch eager, as a share of their size."""
    if not {"eager", "bnlab"} <= set(steps):
        return None
    pairs = zip(_gradients(steps["bnlab"]), _gradients(steps["eager"]), strict=True)
    return max(float((own - other).float().norm() / other.float().norm()) for own, other in pairs)


def _gradients(steps: dict[str, Step]) -> tuple[Tensor, ...]:
    gradients = steps[PASSES[1]]()
    assert isinstance(gradients, tuple)  # what torch.autograd.grad returns
    return gradients


def _cells(case: LayerCase, row: LayerRow, stage: Stage) -> list[str]:
    figures, bandwidth = stage.output.figures, stage.record.bandwidth
    times = [
        [1e6 * row.times[which][side].median if side in row.times[which] else None for which in PASSES]
        for side in SIDES
    ]
    ratios = [[row.ratio(side, which) for which in PASSES] for side in SIDES[:2]]
    megabytes = [
        " / ".join(f"{traffic(which, case.residual, in_one_launch=one) * case.bytes / 1e6:.0f}" for which in PASSES)
        for one in (True, False)
    ]
    shares = [[row.share_of_copy(bandwidth, which, in_one_launch=one) for which in PASSES] for one in (True, False)]
    return [
        case.label,
        *(figures(values, 1) for values in times),
        *(figures(values, 2) for values in ratios),
        " | ".join(megabytes),
        " | ".join(figures(values, 2) for values in shares),
    ]
