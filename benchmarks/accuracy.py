"""Measures the largest error of train-mode BN, for bnlab's and torch's layers.

The benchmark compares y with the formula of Ioffe and Szegedy 2015 (arXiv 1502.03167, Algorithm 1) in numpy's longest
float, on the same rounded input. Errors are in units of eps(dtype) * max(1, max|y|). Every row shows the larger error
of runs on 1 and on 2 threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bnlab

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.exact import LIMIT, RATIOS, error, exact, shifted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
LARGEST_HALF_MEAN = 6e4
PAGE = """# Accuracy of the train-mode output

This page shows how far the train-mode output of bnlab's and torch's BN layers is from the exact result; read it if your
inputs have large means or come in channels_last.

`bnlab bench accuracy --output docs/accuracy.md` writes this page. The input has shape {shape}. Both
layers run with torch {torch} on the CPU.

- The error is the largest difference from the formula of Ioffe and Szegedy 2015 (arXiv:1502.03167, Algorithm 1). The
  benchmark evaluates this formula in extended precision on the same rounded input.
- The unit of the error is eps(dtype) * max(1, max|y|). Correct rounding has an error of 0.5. The limit for bnlab is 4,
  and it applies up to a mean of 1e4 standard deviations.
- Each row gives the larger error of two runs, one on 1 thread and one on 2 threads, and whether both runs give the same
  bits.

{table}

At a mean of 1e4 the numbers of bfloat16 are 64 apart. The channel is therefore constant, and the right answer is 0.
"""


def main() -> None:
    """Measure, print the table, and write it to a file if requested. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench accuracy", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 64, 56, 56), metavar=("N", "C", "H", "W"))
    parser.add_argument("--output", type=Path, help="write the table here as Markdown")
    options = parser.parse_args()
    rows = [
        measure(tuple(options.shape), dtype, layout, ratio)
        for dtype in DTYPES
        for layout in LAYOUTS
        for ratio in RATIOS
        if not (dtype == torch.float16 and ratio > LARGEST_HALF_MEAN)
    ]
    header = ("dtype", "layout", "mean/std", "bnlab", "torch", "same bits at 1 and 2 threads: bnlab", "torch")
    table = Table(title=f"error in eps * max(1, max|y|), shape {tuple(options.shape)}", title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console = Console(width=110)
    console.print(table)
    if options.output:
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *rows)]
        text = PAGE.format(shape=tuple(options.shape), torch=torch.__version__, table="\n".join(lines))
        options.output.write_text(text, encoding="utf-8")
    within = [float(row[3]) for row in rows if float(row[2]) <= 1e4]
    console.print(f"largest error of bnlab for mean/std up to 1e4: {max(within):.2f} eps (limit: {LIMIT:g})")


def measure(shape: tuple[int, ...], dtype: torch.dtype, layout: str, ratio: float) -> tuple[str, ...]:
    """Return one row of the table."""
    x = LAYOUTS[layout](shifted(shape, dtype, ratio))
    expected = exact(x)
    results = {}
    for name, make in (("bnlab", bnlab.nn.BatchNorm2d), ("torch", nn.BatchNorm2d)):
        results[name] = [output(make, x, threads) for threads in (1, 2)]
    errors = {name: max(error(y, expected) for y in ys) for name, ys in results.items()}
    same = {name: "yes" if torch.equal(*ys) else "no" for name, ys in results.items()}
    label = str(dtype).removeprefix("torch.")
    figures = (f"{errors['bnlab']:.2f}", f"{errors['torch']:.3g}", same["bnlab"], same["torch"])
    return label, layout, f"{ratio:g}", *figures


def output(make: Callable[..., nn.Module], x: Tensor, threads: int) -> Tensor:
    """Return the output of a new layer for `x` in train mode."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            y: Tensor = make(x.size(1), momentum=0.0)(x)
    finally:
        torch.set_num_threads(before)
    return y


if __name__ == "__main__":
    main()
