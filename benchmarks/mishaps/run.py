"""Builds the cases, checks them, and prints the tables and the main result."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bnlab
from bnlab.errors import BnlabError
from bnlab.records import Level, Status

from . import (
    healthy,
    planted_axes,
    planted_edits,
    planted_groups,
    planted_inputs,
    planted_modes,
    planted_padding,
    planted_ports,
    planted_pruning,
    planted_structure,
    planted_thresholds,
    planted_training,
    planted_updates,
    real,
    table,
)
from .case import HEALTHY, MISHAPS, Absent, Case, Setting
from .networks import HELD_OUT

__all__ = ["CALIBRATION", "Result", "headline", "main", "parse_seeds", "run_case", "setting_of"]

CALIBRATION = frozenset(range(5))
"""The seeds for the calibration of thresholds. Published figures come from other seeds."""

GROUPS = (
    healthy,
    planted_axes,
    planted_edits,
    planted_groups,
    planted_inputs,
    planted_modes,
    planted_padding,
    planted_ports,
    planted_pruning,
    planted_structure,
    planted_thresholds,
    planted_training,
    planted_updates,
    real,
)
"""The modules that register cases."""


@dataclass(frozen=True)
class Result:
    """The result of the tool for one case.

    Attributes:
        name: The name of the case.
        seed: The seed of the case.
        held_out: Whether the case used the architecture that is not used for calibration.
        healthy: Whether the network is healthy.
        planted: The layers that should be stale, if they are some of many.
        seconds: The seconds of building and of checking.
        codes: The codes of the findings, most consequential first.
        warnings: The number of warnings, without those that the table lists as true.
        errors: The number of errors, without those that the table lists as true.
        crashed: The checks that crashed.
        refused: The error, if there is no diagnosis at all.
        causes: The name and share of every cause, largest first.
        stale: The layers that the tool reports as stale.
        numbers: The numbers of the metric, or None.
        findings: "LEVEL CODE layer: message" for every finding.
        conclusion: The conclusion of the diagnosis.
        notes: The notes of the diagnosis.
    """

    name: str
    seed: int
    held_out: bool
    healthy: bool
    planted: tuple[str, ...]
    seconds: tuple[float, float]
    codes: tuple[str, ...] = ()
    warnings: int = 0
    errors: int = 0
    crashed: tuple[str, ...] = ()
    refused: str = ""
    causes: tuple[tuple[str, float], ...] = ()
    stale: tuple[str, ...] = ()
    numbers: dict[str, float | None] | None = None
    findings: tuple[str, ...] = ()
    conclusion: str = ""
    notes: tuple[str, ...] = ()

    @property
    def expected(self) -> table.Expected:
        """The right result of the table."""
        return table.MISHAPS[self.name]

    @property
    def hit(self) -> bool:
        """Whether the tool reported one of the expected codes, and wrote the expected text."""
        is_written = any(self.expected.concludes in text for text in (self.conclusion, *self.findings))
        is_written &= not self.expected.notes or any(self.expected.notes in note for note in self.notes)
        return is_written and (not self.expected.codes or any(code in self.codes for code in self.expected.codes))

    @property
    def main_hit(self) -> bool:
        """Whether the tool reported the main code."""
        return self.expected.codes[0] in self.codes if self.expected.codes else self.hit

    @property
    def first_cause(self) -> str | None:
        """The cause that the tool names first."""
        return self.causes[0][0] if self.causes else None

    @property
    def right_cause(self) -> bool | None:
        """Whether the first cause is the planted one; None if no cause is planted."""
        return None if self.expected.cause is None else self.first_cause == self.expected.cause

    @property
    def right_layers(self) -> bool | None:
        """Whether the tool reports exactly the planted layers as stale; None if they are not some of many."""
        return set(self.stale) == set(self.planted) if self.planted else None


def setting_of(seed: int) -> Setting:
    """Return the setting of a seed. Two of three seeds outside the calibration use held-out architectures in turn."""
    turn = seed % (len(HELD_OUT) + 1)
    return Setting(seed, HELD_OUT[turn] if seed not in CALIBRATION and turn < len(HELD_OUT) else "cnn")


def run_case(case: Case, setting: Setting) -> Result:
    """Build a case and check it.

    Raises:
        Absent: If the data of the case is not on this machine.
    """
    start = time.perf_counter()
    subject = case.build(setting)
    built = time.perf_counter()
    arguments = {
        "data": subject.data,
        "train_data": subject.train_data,
        "metric": subject.metric,
        "loss": subject.loss,
        "optimizer": subject.optimizer,
    }
    try:
        diagnosis = bnlab.check(subject.model, **arguments)  # type: ignore[arg-type]
    except BnlabError as error:
        seconds = (built - start, time.perf_counter() - built)
        return Result(
            name=case.name,
            seed=setting.seed,
            held_out=setting.held_out,
            healthy=case.name in HEALTHY,
            refused=str(error),
            planted=subject.planted,
            seconds=seconds,
        )
    true = table.TRUE_WARNINGS.get(case.name, ())
    levels = Counter(finding.level for finding in diagnosis.findings if finding.code not in true)
    return Result(
        name=case.name,
        seed=setting.seed,
        held_out=setting.held_out,
        healthy=case.name in HEALTHY,
        codes=tuple(dict.fromkeys(finding.code for finding in diagnosis.findings)),
        warnings=levels[Level.WARNING],
        errors=levels[Level.ERROR],
        crashed=tuple(
            f"{outcome.code}: {outcome.reason}" for outcome in diagnosis.outcomes if outcome.status is Status.CRASHED
        ),
        causes=tuple((cause.cause, cause.share) for cause in diagnosis.causes),
        planted=subject.planted,
        stale=tuple(f.layer for f in diagnosis.findings if f.code == "BN401" and f.layer is not None),
        numbers=None if diagnosis.numbers is None else asdict(diagnosis.numbers),
        findings=tuple(f"{f.level.value} {f.code} {f.layer or ''}: {f.message}" for f in diagnosis.findings),
        conclusion=diagnosis.conclusion,
        notes=diagnosis.notes,
        seconds=(built - start, time.perf_counter() - built),
    )


def main() -> None:
    """Run the benchmark and print its tables. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench mishaps", description=__doc__)
    parser.add_argument(
        "--seeds", type=parse_seeds, default=(5, 6), help="seeds such as 0-4 or 5,6; 0-4 are the calibration seeds"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="the name of a case, or the beginning of several names"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140, highlight=False)
    results, absent = _run(options.seeds, options.only, console)
    broken = [result for result in results if not result.healthy]
    sound = [result for result in results if result.healthy]
    _print_mishaps(broken, console)
    _print_healthy(sound, console)
    for line in sorted(absent):
        console.print(f"skipped: {line}")
    if options.json:
        _write(options.json, results)
    seconds = sum(sum(result.seconds) for result in results)
    checking = statistics.median(result.seconds[1] for result in results) if results else 0.0
    console.print(f"seeds {', '.join(map(str, options.seeds))}; {seconds:.0f} s, a check {checking:.2f} s (median)")
    print(headline(results))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of a text such as "0-4" or "5,6"."""
    first, dash, last = text.partition("-")
    return tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))


def _run(seeds: Sequence[int], only: Sequence[str] | None, console: Console) -> tuple[list[Result], set[str]]:
    cases = [*MISHAPS.values(), *HEALTHY.values()]
    if only:
        exact = [case for case in cases if case.name in only]
        cases = exact or [case for case in cases if case.name.startswith(tuple(only))]
    results: list[Result] = []
    absent: set[str] = set()
    for seed in seeds:
        setting = setting_of(seed)
        for case in cases:
            if case.name in HELD_OUT and seed in CALIBRATION:
                continue
            try:
                results.append(run_case(case, setting))
            except Absent as reason:
                absent.add(f"{case.name}: {reason}")
            except Exception:
                console.print(f"{case.name}, seed {seed}:")
                raise
    return results, absent


def _print_mishaps(results: Sequence[Result], console: Console) -> None:
    shown = Table(title="mishaps", title_justify="left")
    for header in ("case", "seed", "expected", "found", "", "cause", "first cause", "", "layers"):
        shown.add_column(header, overflow="fold")
    for result in results:
        share = f"{result.first_cause} {result.causes[0][1]:.2f}" if result.causes else ""
        shown.add_row(
            result.name,
            f"{result.seed}{'*' if result.held_out else ''}",
            " ".join(result.expected.codes) or result.expected.concludes or result.expected.notes,
            " ".join([*result.codes, *_trouble(result)]),
            "hit" if result.main_hit else "hit, not the main one" if result.hit else "MISS",
            result.expected.cause or "",
            share,
            _mark(result.right_cause),
            _mark(result.right_layers),
        )
    console.print(shown)
    held_out = " or ".join(HELD_OUT)
    console.print(f"* The case uses {held_out}, which is not used for calibration, instead of the usual architecture.")
    by_cause = Table(title="recall by planted cause", title_justify="left")
    for header in ("cause", "cases", "code found", "named first"):
        by_cause.add_column(header)
    for cause in dict.fromkeys(result.expected.cause for result in results):
        chosen = [result for result in results if result.expected.cause == cause]
        named = _share(result.right_cause for result in chosen) if cause else ""
        by_cause.add_row(cause or "(none of the gap)", str(len(chosen)), _share(r.hit for r in chosen), named)
    console.print(by_cause)


def _print_healthy(results: Sequence[Result], console: Console) -> None:
    shown = Table(title="healthy networks", title_justify="left")
    for header in ("case", "seed", "errors", "warnings", "found"):
        shown.add_column(header, overflow="fold")
    for result in results:
        problems = [line for line in result.findings if not line.startswith("info")] + _trouble(result)
        mark = f"{result.seed}{'*' if result.held_out else ''}"
        shown.add_row(result.name, mark, str(result.errors or ""), str(result.warnings or ""), "\n".join(problems))
    console.print(shown)


def _trouble(result: Result) -> list[str]:
    """Return the crashes and refusals of the tool itself."""
    return [f"crashed {line}" for line in result.crashed] + ([f"refused: {result.refused}"] if result.refused else [])


def _mark(right: bool | None) -> str:
    return "" if right is None else "right" if right else "WRONG"


def _share(right: Iterable[bool | None]) -> str:
    counted = [value for value in right if value is not None]
    return f"{sum(counted) / len(counted):.2f} ({sum(counted)}/{len(counted)})" if counted else "none"


def headline(results: Sequence[Result]) -> str:
    """Return the last line of the output, the main result."""
    broken = [result for result in results if not result.healthy]
    sound = [result for result in results if result.healthy]
    warnings = sum(result.warnings for result in sound) / max(len(sound), 1)
    with_any = sum(bool(result.warnings) for result in sound)
    layers = _share(result.right_layers for result in broken)
    return (
        f"mishaps: recall {_share(result.hit for result in broken)}, main code {_share(r.main_hit for r in broken)}, "
        f"first cause {_share(result.right_cause for result in broken)}, layers {layers}, "
        f"false warnings per healthy network {warnings:.2f} (in {with_any} of {len(sound)}), "
        f"errors {sum(result.errors for result in sound)}, crashed or refused {sum(bool(_trouble(r)) for r in results)}"
    )


def _write(path: Path, results: Sequence[Result]) -> None:
    rows = [asdict(result) for result in results]
    path.write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")
