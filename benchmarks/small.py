"""Measures the forward and backward pass of BN on small tensors: bnlab's layer against torch's layer.

The layers alternate in one process, each after an untimed run. The table shows medians over repetitions of many calls
each, with running statistics and counter. Set OMP_PROC_BIND=true for stable results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bnlab

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.steps import LAYOUTS, batch_norm, forward_and_backward
from benchmarks.measuring.timing import alternating, medians, wall

SHAPES = ((128, 100), (32, 64, 14, 14), (16, 64, 56, 56))
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
    x, grad = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    readings = {}
    for side, package in (("bnlab", bnlab.nn), ("torch", nn)):
        layer = batch_norm(package, len(shape), shape[1])
        step = forward_and_backward(layer, x, None, grad, list(layer.parameters()))
        readings[side] = wall(step, calls=CALLS[shape])
    seconds = medians(alternating(readings, repetitions))
    return 1e6 * seconds["bnlab"], 1e6 * seconds["torch"]


if __name__ == "__main__":
    main()
