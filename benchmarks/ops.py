"""Measures BN with a residual and an activation in train mode: bnlab's layers against torch eager and torch.compile.

A call is a forward and a backward pass. The libraries alternate in one process, and each timed call follows an untimed
call of the same library. The tables show medians. The floor is the time of the smallest memory traffic of a layer, at
the speed of a copy of the same tensor on the same threads. BN and ReLU move at least 5 activations where a channel
stays in the cache between the passes (contiguous), and 8 where it cannot (channels_last). With a residual they move 7
and 11.

--quick takes less than a minute. It prints how many activations BN and ReLU move, forward and backward, on large
tensors: twice their time over the time of a copy, which moves 2. Compare later changes with the printed reference.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnlab
from bnlab.kernels import Request, choose

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.resnet50 import BN_ACTIVATIONS
from benchmarks.measuring.steps import (
    DTYPES,
    LAYOUTS,
    SMALL_SHAPES,
    batch_norm,
    compiled,
    forward_and_backward,
    torch_forward,
)
from benchmarks.measuring.timing import Step, alternating, geometric_mean, medians, restart_with, wall

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "1073741824",
    "OMP_PROC_BIND": "true",
}
"""Without these settings, glibc returns the memory of every output, and the benchmark measures page faults."""

THIN = (1, 3, 4)
FLOORS = {("contiguous", False): 5, ("channels_last", False): 8, ("contiguous", True): 7, ("channels_last", True): 11}
"""The smallest number of activations that must move, by layout and residual."""

LARGE = ((64, 112), (256, 56), (512, 28))
"""The channels and the side of activations of ResNet-50 that no second-level cache holds at batch size 32."""

REFERENCE = {"contiguous": 6.1, "channels_last": 9.5}
"""Activations that the kernels of version 0.1 move in float32, on the first machine of docs/kernels.md."""


@dataclass(frozen=True)
class Row:
    """Median milliseconds of bnlab, of torch and of a copy of the input; forward and backward together."""

    bnlab_ms: float
    torch_ms: float
    copy: float

    @property
    def ratio(self) -> float:
        """The time of torch over the time of bnlab."""
        return self.torch_ms / self.bnlab_ms


def main() -> None:
    """Measure and print. The last line is the main result."""
    restart_with(ENVIRONMENT, __file__)
    parser = argparse.ArgumentParser(prog="bnlab bench ops", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="measure only the activations moved on large tensors")
    parser.add_argument("--output", help="also write the tables to this file, in the form of docs/kernels_measured.txt")
    parser.add_argument(
        "--part", action="append", choices=list(PARTS), help="the part to measure; all parts by default"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=120, record=options.output is not None)
    console.print(f"backend: {choose(Request('cpu', 'float32', masked=False, count=9))}, {options.threads} threads")
    if options.quick:
        console.print(quick(console, options))
    else:
        headlines = [line for name in options.part or PARTS for line in PARTS[name](console, options)]
        console.print("time of the other side / ours:", *headlines, sep="\n  ")
    if options.output is not None:
        console.save_text(options.output, clear=False)


def quick(console: Console, options: argparse.Namespace) -> str:
    """Return the number of activations that BN and ReLU move on large tensors, by layout."""
    table = Table(
        title=f"BN + ReLU, forward + backward, batch {options.batch}, float32", title_justify="left", box=None
    )
    table.add_column("shape")
    table.add_column("layout")
    for name in ("bnlab, ms", "copy, ms", "activations moved"):
        table.add_column(name, justify="right")
    headlines = []
    for layout, reference in REFERENCE.items():
        figures = []
        for channels, side in LARGE:
            shape = (options.batch, channels, side, side)
            row = measure(shape, torch.float32, layout, options.repetitions, against_torch=False)
            figures.append(2 * row.bnlab_ms / row.copy)
            table.add_row(str(shape), layout, f"{row.bnlab_ms:.2f}", f"{row.copy:.2f}", f"{figures[-1]:.1f}")
        headlines.append(f"{layout} {geometric_mean(figures):.1f} (reference {reference})")
    console.print(table)
    return f"activations moved, where a copy moves 2: {', '.join(headlines)}"


def resnet(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure BN and ReLU on the activations of ResNet-50."""
    return _networks(console, options, ("float32", "bfloat16"), residual=False)


def residual(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure BN, a residual and ReLU on the activations of ResNet-50."""
    return _networks(console, options, ("float32", "bfloat16"), residual=True)


def half(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure BN and ReLU in float16."""
    return _networks(console, options, ("float16",), residual=False)


def thin(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure channels_last with so few channels that a row is shorter than a vector register."""
    table = _table(f"BN + ReLU, channels_last, ({options.batch}, C, 112, 112), float32", "shape")
    ratios = []
    for channels in THIN:
        shape = (options.batch, channels, 112, 112)
        row = measure(shape, torch.float32, "channels_last", options.repetitions)
        ratios.append(row.ratio)
        table.add_row(str(shape), *_cells(row, None))
    console.print(table)
    return [f"channels_last with {THIN} channels {min(ratios):.1f} at least"]


def small(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure the cost of a call: BN alone on small tensors, with running statistics and counter."""
    table = _table("BN, float32, many calls", "shape", "threads")
    worst, first = 0.0, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in SMALL_SHAPES:
            row = measure(shape, torch.float32, "contiguous", options.repetitions, activation=None, calls=200)
            table.add_row(str(shape), str(threads), *_cells(row, None, digits=4))
            worst = max(worst, 1 / row.ratio)
            first += [f"{SMALL_SHAPES[0]} at {threads} threads {row.ratio:.2f}"] if shape == SMALL_SHAPES[0] else []
    torch.set_num_threads(options.threads)
    console.print(table)
    return [*first, f"small shapes at least {1 / worst:.2f}"]


def against_compiler(console: Console, options: argparse.Namespace) -> list[str]:
    """Measure BN and ReLU against torch.compile of torch's layers."""
    table = _table("BN + ReLU, float32, against torch.compile", "shape", "layout")
    ratios = []
    for layout in LAYOUTS:
        for channels, side in BN_ACTIVATIONS[1:]:
            shape = (options.batch, channels, side, side)
            row = measure(shape, torch.float32, layout, options.repetitions, compile_theirs=True)
            ratios.append(row.ratio)
            table.add_row(str(shape), layout, *_cells(row, None))
    console.print(table)
    return [f"torch.compile {geometric_mean(ratios):.2f}"]


def _networks(console: Console, options: argparse.Namespace, dtypes: Sequence[str], *, residual: bool) -> list[str]:
    what = "BN + add + ReLU" if residual else "BN + ReLU"
    table = _table(f"{what}, forward + backward, batch {options.batch}", "shape", "dtype", "layout")
    headlines = []
    for dtype in dtypes:
        for layout in LAYOUTS:
            ratios = []
            for channels, side in BN_ACTIVATIONS:
                shape = (options.batch, channels, side, side)
                row = measure(shape, DTYPES[dtype], layout, options.repetitions, residual=residual)
                ratios.append(row.ratio)
                table.add_row(str(shape), dtype, layout, *_cells(row, FLOORS[layout, residual]))
            headlines.append(f"{what} {dtype} {layout} {geometric_mean(ratios):.2f} (from {min(ratios):.2f})")
    console.print(table)
    return headlines


def measure(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    repetitions: int,
    *,
    activation: str | None = "relu",
    residual: bool = False,
    against_torch: bool = True,
    compile_theirs: bool = False,
    calls: int = 1,
) -> Row:
    """Return the medians of one case. The time of torch is NaN unless `against_torch` is set."""
    format_ = LAYOUTS[layout] if len(shape) == 4 else torch.contiguous_format
    x, grad, other = (torch.randn(shape).to(dtype).contiguous(memory_format=format_) for _ in range(3))
    x.requires_grad_()
    extra = other.requires_grad_() if residual else None
    layer = batch_norm(bnlab.nn, len(shape), shape[1], activation=activation)
    copied = torch.empty_like(x)
    sides: dict[str, Step] = {
        "bnlab": forward_and_backward(layer, x, extra, grad, list(layer.parameters())),
        "copy": lambda: copied.copy_(x.detach()),
    }
    if against_torch:
        theirs = batch_norm(nn, len(shape), shape[1])
        forward = torch_forward(theirs, activation=activation, in_place=not compile_theirs)
        forward = compiled(forward) if compile_theirs else forward
        sides["torch"] = forward_and_backward(forward, x, extra, grad, list(theirs.parameters()))
    seconds = medians(alternating({name: wall(step, calls=calls) for name, step in sides.items()}, repetitions))
    return Row(1e3 * seconds["bnlab"], 1e3 * seconds.get("torch", math.nan), 1e3 * seconds["copy"])


def _table(title: str, *keys: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for name in keys:
        table.add_column(name)
    for name in ("bnlab, ms", "torch, ms", "torch / bnlab", "copy, ms", "floor / bnlab"):
        table.add_column(name, justify="right")
    return table


def _cells(row: Row, floor: int | None, *, digits: int = 2) -> list[str]:
    """Return the cells of a row. A copy moves two activations."""
    share = "" if floor is None else f"{floor / 2 * row.copy / row.bnlab_ms:.2f}"
    times = (f"{row.bnlab_ms:.{digits}f}", f"{row.torch_ms:.{digits}f}", f"{row.ratio:.2f}", f"{row.copy:.{digits}f}")
    return [*times, share]


PARTS = {
    "resnet": resnet,
    "residual": residual,
    "half": half,
    "thin": thin,
    "small": small,
    "compile": against_compiler,
}

if __name__ == "__main__":
    main()
