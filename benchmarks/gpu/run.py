"""Runs the sections in the order of their importance, until the time is over."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import bnlab
from benchmarks.gpu import accuracy, bandwidth, calls, check, layers, recalibrate, training
from benchmarks.gpu.ahead import Processes, jobs_for
from benchmarks.gpu.command import Options
from benchmarks.gpu.headline import Result, headline, results
from benchmarks.gpu.record import Record, default_path, new_record
from benchmarks.gpu.stage import FULL, TINY, Budget, Section, Stage, attempted, stage_of
from benchmarks.measuring.timing import CPU

__all__ = ["MAKERS", "run", "run_section"]

MAKERS: dict[str, Callable[[], Section]] = {
    "accuracy": accuracy.section,
    "bandwidth": bandwidth.section,
    "training": training.section,
    "recalibrate": recalibrate.section,
    "calls": calls.section,
    "check": check.section,
    **{name: partial(layers.section, name) for name in layers.LAYERS},
}
"""The function that makes each section."""

_AHEAD = 0.45
"""The share of the time after which nobody waits for the processes that compile ahead."""

_GRACE = 60.0
"""The seconds after its time at which a command that hangs in the device is ended."""

_RESULTS = (("result", -88), ("value", 12), ("bar", 8), ("rows", 5), ("met", 12))


def run(options: Options, started: float) -> int:
    """Run the sections, print and record them. Return the exit code: 1 if a side fails in a dry run, else 0."""
    record, stage = _prepared(options)
    path = options.output or (None if options.dry else default_path(record))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    budget = Budget(float("inf") if options.dry else 60 * options.minutes, started)
    if not options.dry:
        faulthandler.dump_traceback_later(
            max(1.0, budget.left()) + _GRACE, exit=True, file=sys.__stderr__ or sys.stderr
        )
    try:
        _run_sections(options, stage, budget, partial(_save, record, path, started))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return _concluded(stage, path, started)


def _run_sections(options: Options, stage: Stage, budget: Budget, save: Callable[[], None]) -> None:
    _introduce(stage)
    with Processes.of(options) as processes:
        for name in options.sections:
            if name != "accuracy":
                about = processes.wait(budget.left() - (1 - _AHEAD) * 60 * options.minutes)
                stage.output.line(about) if about else None
            run_section(name, stage, budget, save)
    if stage.is_dry:
        _compile_one_job(options, stage)


def run_section(name: str, stage: Stage, budget: Budget, save: Callable[[], None]) -> None:
    """Run the rows of a section as long as the time suffices for another one like the last. List the others."""
    gc.collect()
    gc.freeze()  # a collection after each row is quick if it passes over what torch imported
    section = MAKERS[name]()
    stage.output.open(section.title, section.columns)
    needed = section.seconds
    cases = section.cases(stage)
    for index, case in enumerate(cases):
        if budget.left() < needed:
            stage.record.left_out += [left.name for left in cases[index:]]
            stage.output.line(f"    left out, because the time is over: {len(cases) - index} of {len(cases)} rows")
            break
        start = time.monotonic()
        _, reasons = attempted({"the whole row": case.measure})
        stage.fail(case.name, reasons)
        stage.release()
        needed = 1.5 * (time.monotonic() - start) + 1
        save()


def _prepared(options: Options) -> tuple[Record, Stage]:
    device = CPU if options.dry else torch.device("cuda", torch.cuda.current_device())
    sizes = TINY if options.dry else FULL
    settings = {
        "minutes": options.minutes,
        "sections": options.sections,
        "repetitions": options.repetitions,
        "processes": options.processes,
        "sizes": dataclasses.asdict(sizes),
    }
    record = new_record(settings, device, is_dry=options.dry)
    return record, stage_of(is_dry=options.dry, repetitions=options.repetitions, record=record)


def _introduce(stage: Stage) -> None:
    versions = ", ".join(f"{name} {value}" for name, value in stage.record.versions.items() if value)
    if stage.is_dry:
        stage.output.line("dry run on the CPU with tiny tensors: every figure that would be a time is shown as dry")
    stage.output.line(f"{stage.record.device['name']}: {versions}; commit {stage.record.commit}")
    layer = bnlab.nn.BatchNorm2d(64, activation="relu", device=stage.device)
    stage.output.line(f"the layer of bnlab: {layer!r}")


def _save(record: Record, path: Path | None, started: float) -> None:
    record.seconds = time.monotonic() - started
    if path is not None:
        record.write(path)


def _compile_one_job(options: Options, stage: Stage) -> None:
    """Run the first job of a process that compiles ahead, to try its code."""
    for job in jobs_for(stage, options.sections)[-1:]:
        _, reasons = attempted({"compile": job.compile})
        stage.fail("ahead", reasons)


def _concluded(stage: Stage, path: Path | None, started: float) -> int:
    record, output = stage.record, stage.output
    shown = results(record)
    record.headline = [{**dataclasses.asdict(result), "is_met": result.is_met} for result in shown]
    _save(record, path, started)
    output.open("main results, with their bars", _RESULTS)
    for result in shown:
        value = output.figure(result.value, 3)
        output.row([result.name, value, f"{result.rule} {result.bar:g}", str(result.rows), _verdict(result, stage)])
    if record.left_out:
        output.line(f"left out: {len(record.left_out)} rows. Run with more --minutes, or with --only SECTION.")
    output.line(f"{len(record.failures)} sides failed; {record.seconds:.0f} s" + (f"; {path}" if path else ""))
    if stage.is_dry:
        output.line(f"gpu: dry run of {len(record.sections)} sections, {len(record.failures)} sides failed, no times")
        return 1 if record.failures else 0
    output.line(f"gpu: {headline(shown, output)}")
    return 0


def _verdict(result: Result, stage: Stage) -> str:
    if result.is_met is None or stage.is_dry:
        return "-"
    return "yes" if result.is_met else "no"
