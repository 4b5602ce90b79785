"""Measures the forward and backward pass of BN on small tensors: bnlab's layer against torch's layer.

The layers alternate in one process, each after an untimed run. The table shows medians over repetitions of many calls
each, with running statistics and counter. Set OMP_PROC_BIND=true for stable results.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnlab

SHAPES = ((128, 100), (32, 64, 14, 14), (16, 64, 56, 56))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CALLS = {(128, 100): 300, (32, 64, 14, 14): 30, (16, 64, 56, 56): 3}


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench small", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    table = Table(title="forward + backward, float32, microseconds", title_justify="left")
    for name in ("shape", "layout", "threads", "bnlab", "torch", "bnlab / torch"):
        table.add_column(name, justify="right")
    headline = []
    cases = [(shape, layout) for shape in SHAPES for layout in LAYOUTS if len(shape) == 4 or layout == "contiguous"]
    for shape, layout in cases:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            bnlab_us, torch_us = compare(shape, LAYOUTS[layout], options.repetitions)
            table.add_row(
                str(shape), layout, str(threads), f"{bnlab_us:.1f}", f"{torch_us:.1f}", f"{bnlab_us / torch_us:.2f}"
            )
            if shape == SHAPES[0]:
                headline.append(f"{bnlab_us / torch_us:.2f}x at {threads} thread{'s' if threads > 1 else ''}")
    console = Console(width=100)
    console.print(table)
    console.print(f"time of torch for {SHAPES[0]}: {', '.join(headline)}")


def compare(shape: tuple[int, ...], layout: torch.memory_format, repetitions: int) -> tuple[float, float]:
    """Return the median microseconds of a forward and backward pass, of bnlab and of torch."""
    pairs = {2: (bnlab.nn.BatchNorm1d, nn.BatchNorm1d), 4: (bnlab.nn.BatchNorm2d, nn.BatchNorm2d)}
    layers = [make(shape[1]) for make in pairs[len(shape)]]
    x, grad = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    times: list[list[float]] = [[], []]
    for _ in range(repetitions):
        for side, layer in zip(times, layers, strict=True):
            run(layer, x, grad, 1)
            side.append(run(layer, x, grad, CALLS[shape]))
    bnlab_us, torch_us = (1e6 * statistics.median(side) for side in times)
    return bnlab_us, torch_us


def run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, calls: int) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    for _ in range(calls):
        torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    main()
