"""`bnlab check`: what is wrong with the BN state of checkpoints and models."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli._output import check_output, emit
from bnlab.cli._targets import build_model, expand, is_model_spec
from bnlab.errors import BnlabError, NoBatchNorm, UsageError
from bnlab.records import Level, Status

if TYPE_CHECKING:
    from rich.text import Text

    from bnlab.diagnosis import Diagnosis

__all__ = ["command"]


class Format(str, Enum):
    """How the result is written."""

    TEXT = "text"
    JSON = "json"


def command(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="Checkpoints, folders, globs, or package.module:callable."),
    ],
    select: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Checks to run, comma-separated; BN1 is all of BN1xx.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODE=REASON", help="Accept what a check finds, for a reason.")
    ] = None,
    level: Annotated[Level, typer.Option(help="Lowest level that is shown and makes the exit code 1.")] = Level.WARNING,
    format_: Annotated[
        Format, typer.Option("--format", help="json is one object for one target, JSON Lines for several.")
    ] = Format.TEXT,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Write here instead of to stdout.")] = None,
    momentum: Annotated[
        str | None, typer.Option(metavar="X", help="Momentum of the training run, or none for cumulative averages.")
    ] = None,
    eps: Annotated[str | None, typer.Option(metavar="X", help="eps of the layers.")] = None,
) -> None:
    """Check the batch normalization state of checkpoints or models.

    Exit code 0: nothing at or above --level. 1: findings. 2: a target could not be checked.
    """
    expanded = expand(targets)
    if output is not None:
        check_output(output, (target for target in expanded.found if isinstance(target, str)))
    check = _checker(select, ignore, momentum, eps)
    run = _Run(format_, level, output)
    nothing_else = len(expanded.found) == 1 and isinstance(expanded.found[0], BnlabError)
    if expanded.many and not nothing_else:
        run.many(expanded.found, check)
    else:
        run.one(check(expanded.found[0]))
    raise typer.Exit(run.exit_code)


@dataclass
class _Run:
    """Writes diagnoses as they come, and knows what they add up to."""

    format: Format
    level: Level
    output: Path | None
    found: bool = False
    failed: bool = False
    _kept: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 2 if self.failed else int(self.found)

    def one(self, diagnosis: Diagnosis) -> None:
        """Write the whole report of a single target."""
        from bnlab.report import json, text

        self._count(diagnosis)
        if self.format is Format.JSON:
            emit(json.render(diagnosis) + "\n", self.output)
        elif self.output is not None:
            emit(text.render(diagnosis, level=self.level) + "\n", self.output)
        else:
            from rich.console import Console

            Console(highlight=False).print(text.renderable(diagnosis, level=self.level))

    def many(self, targets: Sequence[str | BnlabError], check: Callable[[str | BnlabError], Diagnosis]) -> None:
        """Write a line per target, and in text a summary; a target that fails does not stop the others."""
        from rich.text import Text

        from bnlab.report import json, text

        counts: Counter[str] = Counter()
        for target in self._with_progress(targets):
            try:
                diagnosis = check(target)
            except NoBatchNorm as err:
                counts["without BN"] += 1
                self._line(Text(text.plain(str(err)), style="dim"), to_stderr=self.format is Format.JSON)
                continue
            except BnlabError as err:
                counts["not readable"] += 1
                self._complain(str(err))
                continue
            self._count(diagnosis)
            summary = diagnosis.summary
            counts.update(checked=1, layers=summary.layers, errors=summary.errors, warnings=summary.warnings)
            self._line(json.render_line(diagnosis) if self.format is Format.JSON else text.summary_line(diagnosis))
        if self.format is Format.TEXT:
            self._line(
                Text(
                    f"{len(targets)} targets: {counts['checked']} checked with {counts['layers']} BN layers, "
                    f"{counts['errors']} errors and {counts['warnings']} warnings; "
                    f"{counts['without BN']} without BN, {counts['not readable']} not readable",
                    style="bold",
                )
            )
        if counts["without BN"] == len(targets):
            self._complain("TARGET: at least one must hold batch normalization, got none.")
        if self.output is not None:
            emit("".join(f"{line}\n" for line in self._kept), self.output)

    def _complain(self, message: str) -> None:
        from bnlab.report.text import plain

        self.failed = True
        print(f"error: {plain(message)}", file=sys.stderr)

    def _count(self, diagnosis: Diagnosis) -> None:
        self.found |= any(finding.level.at_least(self.level) for finding in diagnosis.findings)
        for outcome in diagnosis.outcomes:
            if outcome.status is Status.CRASHED:
                self._complain(f"{diagnosis.target.name}: {outcome.code} crashed: {outcome.reason}")

    def _line(self, line: Text | str, *, to_stderr: bool = False) -> None:
        from rich.console import Console

        if self.output is not None and not to_stderr:
            self._kept.append(str(line))
        elif isinstance(line, str):
            print(line)
        else:
            Console(stderr=to_stderr, highlight=False).print(line, soft_wrap=True)

    def _with_progress(self, targets: Sequence[str | BnlabError]) -> Iterable[str | BnlabError]:
        """Show a bar on stderr where the lines themselves do not show the progress."""
        if not sys.stderr.isatty() or (sys.stdout.isatty() and self.output is None):
            return targets
        from rich.console import Console
        from rich.progress import track

        return track(targets, description="checking", console=Console(stderr=True), transient=True)


def _checker(
    select: Sequence[str] | None, ignore: Sequence[str] | None, momentum: str | None, eps: str | None
) -> Callable[[str | BnlabError], Diagnosis]:
    """Return what checks one target; every option is validated before the first target is read."""
    from bnlab.diagnosis import Settings, check_with

    settings = Settings.of(
        select=None if select is None else [code.strip() for part in select for code in part.split(",")],
        ignore=dict(_reason(item) for item in ignore or ()),
        momentum=_number("--momentum", momentum),
        eps=_number("--eps", eps),
    )

    def check(target: str | BnlabError) -> Diagnosis:
        if isinstance(target, BnlabError):
            raise target
        return check_with(build_model(target) if is_model_spec(target) else target, settings, name=target)

    return check


def _reason(item: str) -> tuple[str, str]:
    code, equals, reason = item.partition("=")
    if not equals:
        raise UsageError(f"--ignore: value must be CODE=REASON, got {item!r}.")
    return code.strip(), reason


def _number(option: str, text: str | None) -> Any:
    """Return a number, None for "none", and "assumed" for an option that is not given."""
    if text is None:
        return "assumed"
    if text.lower() == "none" and option == "--momentum":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: value must be a number, got {text!r}.") from None
