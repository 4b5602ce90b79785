"""Measures a training step of a ResNet-50-like network: with torch's layers, bnlab's, and bnlab's fused layers.

Fused layers include the ReLU and the residual. The variants alternate, and each timed step follows an untimed step of
the same variant. The table shows medians. Memory is measured in a separate process for each variant. "Allocated" is
the peak allocation of a step by torch's profiler, which is the same in every run. "Resident" is the largest resident
set, which varies by 5 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.resnet50 import SIDES, network_for, training_step
from benchmarks.measuring.timing import alternating, medians, restart_with, wall

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "OMP_PROC_BIND": "true",
}


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench training", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=SIDES, help="print the peak memory of one variant only")
    options = parser.parse_args()
    if options.peak_of is None:
        restart_with(ENVIRONMENT, __file__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, options.size, options.size)
    if options.peak_of is not None:
        print(json.dumps(peaks_of(options.peak_of, x)))
        return
    times = medians(
        alternating({side: wall(training_step(network_for(x, side), x)) for side in SIDES}, options.repetitions)
    )
    peaks = {side: peaks_in_own_process(side) for side in SIDES}
    table = Table(title=f"training step, {tuple(x.shape)}, float32, contiguous, {options.threads} threads", box=None)
    for name in ("side", "time, s", "time / torch", "allocated, MB", "/ torch", "resident, MB", " / torch"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side in SIDES:
        cells = [f"{times[side]:.3f}", f"{times[side] / times['torch']:.3f}"]
        for mine, theirs in zip(peaks[side], peaks["torch"], strict=True):
            cells += [f"{mine / 1e6:.0f}", f"{mine / theirs:.3f}"]
        table.add_row(side, *cells)
    console = Console(width=100)
    console.print(table)
    fused = SIDES[-1]
    console.print(
        f"fused layers: {times[fused] / times['torch']:.3f} of the time of torch, "
        f"{peaks[fused][0] / peaks['torch'][0]:.3f} of its memory"
    )


def peaks_of(side: str, x: Tensor) -> tuple[int, int]:
    """Return the peak allocation of a step and the largest resident set, in bytes. The latter includes torch itself."""
    step = training_step(network_for(x, side), x)
    for _ in range(3):
        step()
    resident = largest_resident()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes)), resident


def largest_resident() -> int:
    """Return the largest resident set of this process in bytes; getrusage would return that of the parent process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peaks_in_own_process(side: str) -> tuple[int, int]:
    """Return the result of `peaks_of` in a new process, whose allocator returns memory at once."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    allocated, resident = json.loads(done.stdout)
    return allocated, resident


if __name__ == "__main__":
    main()
