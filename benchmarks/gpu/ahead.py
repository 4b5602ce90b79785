"""Compiles before anything is timed: processes side by side fill the caches of torch.compile and Triton on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from typing_extensions import Self

from benchmarks.gpu import layers, training
from benchmarks.gpu.command import Options
from benchmarks.gpu.record import new_record
from benchmarks.gpu.stage import Stage, attempted, stage_of
from benchmarks.measuring.steps import forward_and_backward

__all__ = ["Job", "Processes", "compile_share", "jobs_for", "share_of"]

SCRIPT = Path(__file__).parents[1] / "gpu.py"


class Job(NamedTuple):
    """Something to compile, and about how many seconds it takes."""

    seconds: float
    compile: Callable[[], object]


def jobs_for(stage: Stage, sections: Sequence[str]) -> list[Job]:
    """Return what the sections need compiled: the longest job first, then in the order of the sections."""
    jobs: list[Job] = []
    if "training" in sections:
        for seconds, side in ((60, training.COMPILED), (20, training.FUSED)):
            jobs.append(Job(seconds, partial(_run_step, side, stage)))
    for name in sections:
        if name in layers.LAYERS:
            jobs += [Job(4, partial(_run_layer, case, stage)) for case in layers.layer_cases(stage.sizes, name)]
    return jobs


def share_of(jobs: Sequence[Job], index: int, count: int) -> Iterator[Job]:
    """Yield the jobs of one of several processes: each job goes to the process that has the least to do."""
    loads = [0.0] * count
    for job in jobs:
        target = loads.index(min(loads))
        loads[target] += job.seconds
        if target == index:
            yield job


def compile_share(options: Options) -> None:
    """Compile the share of this process. A job that fails is left to the benchmark, which reports it."""
    index, _, count = (options.share or "0/1").partition("/")
    record = new_record({}, torch.device("cpu"), is_dry=options.dry)
    stage = stage_of(is_dry=options.dry, repetitions=1, record=record)
    for job in share_of(jobs_for(stage, options.sections), int(index), int(count)):
        attempted({"job": job.compile})
        stage.release()


def _run_step(side: str, stage: Stage) -> None:
    training.step_of(side, stage, *stage.images(1))


def _run_layer(case: layers.LayerCase, stage: Stage) -> None:
    x, residual, grad = layers.inputs_of(case, stage.device)
    for side in ("compile", "bnlab"):
        forward, parameters = layers.forward_of(side, case, stage)
        attempted({side: forward_and_backward(forward, x, residual, grad, parameters)})


class Processes:
    """Processes that compile a share each. Use it as a context manager: at the end none is left.

    Args:
        commands: The command of each process.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // max(1, len(commands))))
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
        self._started = time.monotonic()
        self._running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for command in commands
        ]

    @classmethod
    def of(cls, options: Options) -> Processes:
        """Start the processes that the options ask for, unless the sections need nothing compiled."""
        only = [argument for name in options.sections for argument in ("--only", name)]
        count = options.processes if {"training", *layers.LAYERS} & set(options.sections) else 0
        shares = [f"{index}/{count}" for index in range(count)]
        return cls([[sys.executable, str(SCRIPT), "--compile-share", share, *only] for share in shares])

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        self._end()

    def wait(self, seconds: float) -> str:
        """Wait for all processes, but no longer than some seconds; then end them. Return a sentence about it, or ""."""
        if not self._running:
            return ""
        until = time.monotonic() + seconds
        count, late = len(self._running), sum(not _ends(process, until) for process in self._running)
        failed = sum(process.returncode not in (0, None) for process in self._running)
        took = time.monotonic() - self._started
        self._end()
        rest = f"; {late} did not end and {failed} failed: the rest is compiled when it is needed"
        return f"compiled ahead by {count} processes in {took:.0f} s{rest if late or failed else ''}"

    def _end(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._running = []


def _ends(process: subprocess.Popen[bytes], until: float) -> bool:
    """Wait for a process, and return whether it ended in time."""
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True
