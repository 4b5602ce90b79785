"""Measures `bnlab.watch`: which planted mishaps it sees, on which healthy loops it is silent, and what it costs.

A loop counts as right where the first event has the right code, step and layer, or where a healthy one has no event.
The cost is that of a training step of a ResNet-50-like network with 53 BN layers. Three networks alternate: one without
a watch, one with a watch between samples, and one whose every step is sampled. At the default interval, 2 of 100 steps
are sampled. On a GPU, operations are launches: the table counts those that a step adds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import bnlab
from benchmarks.measuring.resnet50 import network_for, training_step
from benchmarks.measuring.timing import Step, alternating, medians, restart_with, wall
from benchmarks.watching.healthy import HEALTHY
from benchmarks.watching.loop import Loop
from benchmarks.watching.networks import NETWORKS, Build
from benchmarks.watching.planted import PLANTED

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "OMP_PROC_BIND": "true",
}
EVERY = 100
WATCHES = {"no watch": None, "watch, between samples": 10**9, "watch, sampled": 1}
"""The interval of the samples, by side. The first two steps, which every interval samples, are not timed."""


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench watch", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("loops", "cost"), help="measure one part only")
    options = parser.parse_args()
    restart_with(ENVIRONMENT, __file__)
    console = Console(width=110)
    results = []
    if options.only != "cost":
        torch.set_num_threads(1)
        results.append(loops(console, options.seeds))
    if options.only != "loops":
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        results.append(cost(console, torch.randn(options.batch, 3, options.size, options.size), options.repetitions))
    console.print("; ".join(results), soft_wrap=True)


def loops(console: Console, seeds: int) -> str:
    """Run every loop with each network and seed. Return the main result."""
    table = Table(title=f"{len(NETWORKS)} networks, {seeds} seeds", box=None)
    for name in ("loop", "first event", "right"):
        table.add_column(name, justify="right" if name == "right" else "left")
    right = {"planted": [0, 0], "healthy": [0, 0]}
    for kind, group in (("planted", PLANTED), ("healthy", HEALTHY)):
        for loop in group:
            outcomes = [is_right(loop, build, seed) for build in NETWORKS.values() for seed in range(seeds)]
            right[kind][0] += sum(outcomes)
            right[kind][1] += len(outcomes)
            table.add_row(loop.name, loop.code or "none", f"{sum(outcomes)}/{len(outcomes)}")
    console.print(table)
    planted, healthy = (f"{ok} of {total}" for ok, total in right.values())
    return f"first event right in {planted} planted runs; silent in {healthy} healthy runs"


def is_right(loop: Loop, build: Build, seed: int) -> bool:
    """Run a loop once."""
    torch.manual_seed(seed)
    return loop.run(build).is_right(loop.code)


def cost(console: Console, x: Tensor, repetitions: int) -> str:
    """Time a step with and without a watch, and count its operations. Return the main result."""
    watches: list[bnlab.Watch] = []
    steps = {side: watched_step(x, every, watches) for side, every in WATCHES.items()}
    for step in steps.values():
        step()
        step()
    operations = {side: operations_of(step) for side, step in steps.items()}
    times = medians(alternating({side: wall(step) for side, step in steps.items()}, repetitions))
    for watch in watches:
        watch.stop()
    bare, between, sampled = times.values()
    overhead = ((EVERY - 2) * between + 2 * sampled) / EVERY / bare - 1
    table = Table(title=f"training step, {tuple(x.shape)}, float32, {torch.get_num_threads()} threads", box=None)
    for name in ("side", "time, s", "time / no watch", "operations added"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side, seconds in times.items():
        added = operations[side] - operations["no watch"]
        table.add_row(side, f"{seconds:.3f}", f"{seconds / bare:.3f}", str(added))
    console.print(table)
    return f"overhead at the default interval of {EVERY}: {100 * overhead:.1f} % of a step"


def watched_step(x: Tensor, every: int | None, watches: list[bnlab.Watch]) -> Step:
    """Return a training step of a network of its own, with a watch that is added to a list."""
    model = network_for(x, "torch")
    if every is not None:
        watches.append(bnlab.watch(model, every=every).start())
    return training_step(model, x)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of(step: Step) -> int:
    """Return the number of operations of torch in a step."""
    counter = _Counter()
    with counter:
        step()
    return counter.count


if __name__ == "__main__":
    main()
