"""Measures the recomputation of running statistics: bnlab.recalibrate, fvcore's update_bn_stats, torch's update_bn.

The tools alternate on the same model and batches in one process, and the table shows medians. The errors compare the
stored statistics with float64 moments of the same activations, by each tool's own definition of the variance. fvcore
is not a dependency: pip install --no-deps fvcore iopath portalocker tabulate termcolor tqdm yacs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnlab
from bnlab.functional import Moments, batch_moments, population_moments

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.resnet50 import classifier, decoder, resnet50
from benchmarks.measuring.timing import restart_with, seconds_of

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""Without these settings, glibc returns the memory of every activation, and the benchmark measures page faults."""

Update = Callable[[nn.Module, list[Tensor]], object]


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench recalibrate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.batch_size, 3, options.size, options.size)
    batches = [torch.randn(shape) for _ in range(options.batches)]
    table = Table(
        title=f"{options.batches} batches of {shape}, float32, contiguous, {options.threads} threads",
        title_justify="left",
    )
    for name in ("network", "side", "seconds", "bnlab / it", "abs(d mean) / std", "abs(d var) / var"):
        table.add_column(name, justify="left" if name in ("network", "side") else "right")
    headline = []
    for name, head in (("ResNet-50-like", classifier), ("and a head without BN", decoder)):
        rows = compare(resnet50(head()), batches, options.rounds)
        for side, row in rows.items():
            ratio = rows["bnlab"].seconds / row.seconds
            table.add_row(
                name,
                side,
                f"{row.seconds:.3f}",
                f"{ratio:.3f}",
                f"{row.mean_error:.1e}",
                f"{row.var_error:.1e}",
            )
            if side != "bnlab":
                headline.append(f"{ratio:.3f} of {side}{' (head without BN)' if head is decoder else ''}")
    console = Console(width=130)
    console.print(table)
    console.print(f"time of bnlab.recalibrate: {', '.join(headline)}")


@dataclass(frozen=True)
class Row:
    """The measurements of one tool: the median seconds, and the largest errors over all layers."""

    seconds: float
    mean_error: float
    var_error: float


def sides() -> dict[str, Update]:
    """Return the tools to compare, with fvcore only if it is installed."""
    updates: dict[str, Update] = {
        "bnlab": bnlab.recalibrate,
        "torch update_bn": lambda model, batches: update_bn(batches, model),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fvcore.nn.precise_bn import update_bn_stats
    except ImportError as error:
        print(f"fvcore is not compared: {error}", file=sys.stderr)
        return updates
    updates["fvcore"] = lambda model, batches: update_bn_stats(model, batches, len(batches))
    return updates


def compare(model: nn.Module, batches: list[Tensor], rounds: int) -> dict[str, Row]:
    """Return a row for each tool."""
    truth = true_moments(model, batches)
    updates = sides()
    times: dict[str, list[float]] = {side: [] for side in updates}
    errors: dict[str, tuple[float, float]] = {}
    for index in range(rounds + 1):
        for side, update in updates.items():
            own = copy.deepcopy(model).train()
            seconds = seconds_of(functools.partial(update, own, batches), device=batches[0].device)
            if index:  # the first round warms up
                times[side].append(seconds)
                continue
            errors[side] = largest_errors(own, truth, side)
    return {side: Row(statistics.median(times[side]), *errors[side]) for side in updates}


def true_moments(model: nn.Module, batches: list[Tensor]) -> Mapping[str, list[Moments]]:
    """Return the float64 moments of the input of every layer in train mode, batch by batch."""
    model = copy.deepcopy(model).train()
    moments: dict[str, list[Moments]] = {name: [] for name, _ in layers_of(model)}
    for name, layer in layers_of(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: moments[name].append(batch_moments(args[0])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return moments


def largest_errors(model: nn.Module, truth: Mapping[str, list[Moments]], side: str) -> tuple[float, float]:
    """Return the largest error of a mean in standard deviations, and the largest relative error of a variance."""
    errors = []
    for name, layer in layers_of(model):
        mean, var = population_moments(truth[name], "within-batch" if side.startswith("torch") else "population")
        if side == "fvcore":
            count = float(sum(moments.count for moments in truth[name]))
            var = var * (count - 1) / count
        stored_mean, stored_var = (layer.get_buffer(key).double() for key in ("running_mean", "running_var"))
        errors.append(((stored_mean - mean).abs() / var.sqrt(), (stored_var - var).abs() / var))
    means, variances = zip(*errors, strict=True)
    return float(torch.cat(means).max()), float(torch.cat(variances).max())


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.BatchNorm2d]]:
    """Yield every BN layer with its path."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))


if __name__ == "__main__":
    restart_with(ALLOCATOR, __file__)
    main()
