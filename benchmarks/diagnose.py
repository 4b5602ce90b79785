"""Measures the cost of observing a model on data, relative to a plain forward pass over the same batches.

The model is a ResNet-50-like network in eval mode, in float32 and without gradients, on batches of 32 images.
`observe` captures the evidence: the statistics of every layer, batch by batch. `check` is the whole diagnosis without
a metric. It also reads the executed graph and compares the outputs of both modes. Every reading runs in its own
process, after an untimed run of the same work. The contenders alternate, and the table shows medians. Memory is the
peak resident set (VmHWM) of the process, relative to that of a plain pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

CHILD = """
import json, sys, time, torch
sys.path.insert(0, {root!r})
import bnlab
from benchmarks.measuring.resnet50 import classifier, resnet50
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject
from bnlab.observe.discover import any_batch_norm

torch.manual_seed(0)
model, data = resnet50(classifier()).eval(), [torch.randn(32, 3, {size}, {size}) for _ in range({batches})]
def forward():
    with torch.no_grad():
        for batch in data:
            model(batch)
def observing():
    observe(Subject(model), any_batch_norm(model), data)
def checking():
    bnlab.check(model, data=data)
run = {{"forward": forward, "observe": observing, "check": checking}}[{what!r}]
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
run()
start = time.perf_counter()
run()
print(json.dumps([time.perf_counter() - start, peak()]))
"""


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench diagnose", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224])
    options = parser.parse_args()
    table = Table(title="ResNet-50-like, batches of 32, float32, 2 threads", title_justify="left")
    for name in ("image", "batches", "what", "seconds", "time / forward", "peak MB", "peak / forward"):
        table.add_column(name, justify="right")
    headline = []
    for size in options.sizes:
        for batches in (2, 8) if size < 100 else (1, 2):
            times, peaks = measure(size, batches, options.repetitions)
            for what in times:
                ratio, memory = times[what] / times["forward"], peaks[what] / peaks["forward"]
                table.add_row(
                    f"{size}x{size}", str(batches), what, f"{times[what]:.2f}", f"{ratio:.2f}", f"{peaks[what]:.0f}",
                    f"{memory:.2f}",
                )  # fmt: skip
                if what == "observe":
                    headline.append(f"{ratio:.2f}x time, {memory:.2f}x memory at {size}x{size} ({batches} batches)")
    console = Console(width=110)
    console.print(table)
    console.print(f"observing beside a forward pass: {'; '.join(headline)}")


def measure(size: int, batches: int, repetitions: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds and the median peak MB of each contender."""
    readings: dict[str, list[tuple[float, float]]] = {"forward": [], "observe": [], "check": []}
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "OMP_PROC_BIND": "true",
        "OMP_NUM_THREADS": "2",
    }
    for _ in range(repetitions):
        for what, values in readings.items():
            code = CHILD.format(root=str(ROOT), size=size, batches=batches, what=what)
            result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
            seconds, megabytes = json.loads(result.stdout)
            values.append((seconds, megabytes))
    times = {what: statistics.median(value for value, _ in values) for what, values in readings.items()}
    return times, {what: statistics.median(value for _, value in values) for what, values in readings.items()}


if __name__ == "__main__":
    main()
