"""Measures bnlab's layers and commands on one GPU, beside torch eager and torch.compile.

The sections come in the order of their importance. Each prints a row as soon as it is measured, and the command ends
within its minutes: what they did not suffice for is listed. The same figures, unrounded, go to a JSON file after every
row. The last line shows the main results beside their bars.

A figure is the median of several readings. The sides take turns in one process. A reading is one replay of a CUDA
graph between two CUDA events, after a buffer of four times the second-level cache was overwritten. torch.compile
compiles each shape before it is timed, in processes of their own that only fill its cache; nothing is timed meanwhile.

--dry runs the same code on the CPU with tiny tensors, and shows no times. With --interpret the layers run on the GPU
kernels, through Triton's interpreter; a whole network would take it minutes, so that the sections of networks are left
out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NO_GPU", "SECTIONS", "Options", "interpret_kernels", "main", "parsed"]

SECTIONS = {
    "accuracy": "the largest error of the output for large means",
    "bandwidth": "the copy that memory traffic is compared with",
    "relu-bfloat16": "BN + ReLU in bfloat16",
    "training": "a training step of ResNet-50",
    "recalibrate": "the recomputation of the statistics of ResNet-50",
    "calls": "the cost of a call: small tensors",
    "residual-bfloat16": "BN + add + ReLU in bfloat16",
    "relu-float32": "BN + ReLU in float32",
    "residual-float32": "BN + add + ReLU in float32",
    "check": "the diagnosis of ResNet-50",
}
"""The sections in the order of their importance. The first one needs no clock, and runs while torch compiles."""

INTERPRETED = ("accuracy", "relu-bfloat16", "calls", "residual-bfloat16")
"""The sections that a dry run interprets: a layer at a time."""

NO_GPU = "gpu: device must be a GPU that torch.cuda sees, got none. Run with --dry to try the code on the CPU."


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        minutes: The time that the whole command may take.
        output: The JSON file; None for the default name.
        dry: Whether everything runs on the CPU, with tiny tensors.
        sections: The names of the sections to run.
        repetitions: The number of readings of each side.
        processes: The number of processes that compile before anything is timed. 0 for none.
        interprets: Whether a dry run uses the GPU kernels, through Triton's interpreter.
        share: Which share of the shapes this process compiles, as "INDEX/COUNT"; None for the benchmark itself.
    """

    minutes: float
    output: Path | None
    dry: bool
    sections: tuple[str, ...]
    repetitions: int
    processes: int
    interprets: bool = False
    share: str | None = None


def parsed(arguments: list[str]) -> Options:
    """Return the options of a command line. Exit with code 2 if it is wrong."""
    sections = "".join(f"  {name:<18} {about}\n" for name, about in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="bnlab bench gpu",
        description=__doc__,
        epilog=f"sections:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument("--minutes", type=float, default=3.8, help="end within this time; 3.8 by default")
    parser.add_argument("--output", type=Path, help="JSON file; benchmarks/results/gpu-DEVICE-DATE.json by default")
    parser.add_argument("--dry", action="store_true", help="run every code path on the CPU, and show no times")
    parser.add_argument("--interpret", action="store_true", help="with --dry: interpret the GPU kernels")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section to run; all by default")
    parser.add_argument("--repetitions", type=int, default=15, help="readings of each side; 15 by default")
    parser.add_argument(
        "--processes", type=int, default=processes, help="how many compile at once; 0 to compile when it is needed"
    )
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.repetitions < 1 or options.processes < 0:
        parser.error("--minutes and --repetitions must be > 0, and --processes >= 0.")
    if options.interpret and not options.dry:
        parser.error("--interpret must come with --dry: on a GPU the kernels run as they are.")
    wanted = options.only or (INTERPRETED if options.interpret else SECTIONS)
    chosen = tuple(name for name in SECTIONS if name in wanted)
    return Options(
        options.minutes,
        options.output,
        options.dry,
        chosen,
        1 if options.dry else options.repetitions,
        0 if options.dry else options.processes,
        options.interpret,
        options.compile_share,
    )


def interpret_kernels() -> None:
    """Make Triton interpret the kernels, and bnlab's layers on the CPU use them. Do it before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        print('gpu: --interpret needs triton: pip install "bnlab[triton]"', file=sys.stderr)
        raise SystemExit(2)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["BNLAB_CPU"] = "triton"


def main() -> None:
    """Run the benchmark. Exit with code 2 without a GPU, and with 1 if a side fails in a dry run."""
    started = time.monotonic()
    options = parsed(sys.argv[1:])
    if options.interprets:
        interpret_kernels()
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    from benchmarks.gpu.ahead import compile_share
    from benchmarks.gpu.run import run

    if options.share is not None:
        compile_share(options)
        return
    raise SystemExit(run(options, started))
