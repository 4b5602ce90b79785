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

from bnlab.cli.output import check_output, complain, emit, require_pages
from bnlab.cli.targets import expand, is_model_spec, load_target
from bnlab.errors import BnlabError, NoBatchNorm, UsageError
from bnlab.records import Level, Status

if TYPE_CHECKING:
    from rich.text import Text
    from torch import nn

    from bnlab.diagnosis.check import Diagnosis
    from bnlab.diagnosis.settings import Settings

__all__ = ["command"]


class CheckFormat(str, Enum):
    """How diagnoses are written."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    HTML = "html"


_WHOLE = (CheckFormat.SARIF, CheckFormat.HTML)
"""Formats in which all targets are one document."""


def command(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="Checkpoints, folders, globs, or package.module:callable."),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help="package.module:callable; checkpoints are loaded into its model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="What the model will see: package.module:callable, or digits, ..."),
    ] = None,
    train_data: Annotated[str | None, typer.Option(metavar="SPEC", help="What it was trained on.")] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="SPEC", help="accuracy, loss, or package.module:callable; higher is better.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(metavar="SPEC", help="One batch, to see the executed graph where there is no data.")
    ] = None,
    select: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Checks to run, comma-separated; BN1 is all of BN1xx.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODE=REASON", help="Accept what a check finds, for a reason.")
    ] = None,
    level: Annotated[Level, typer.Option(help="Lowest level that is shown and makes the exit code 1.")] = Level.WARNING,
    format_: Annotated[
        CheckFormat,
        typer.Option(
            "--format",
            help="json is one object for one target, JSON Lines for several; html is a page, sarif for code scanning.",
        ),
    ] = CheckFormat.TEXT,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Write here instead of to stdout.")] = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Put a value for each channel into the JSON; html has them anyway.")
    ] = False,
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
    given = _Given(model=model, data=data, train_data=train_data, metric=metric, example=example)
    if format_ is CheckFormat.HTML:
        require_pages()
    nothing_else = len(expanded.found) == 1 and isinstance(expanded.found[0], BnlabError)
    many = expanded.many and not nothing_else
    check = _checker(
        given, _settings(select, ignore, momentum, eps, per_channel or (format_ is CheckFormat.HTML and not many))
    )
    run = _Run(format_, level, output)
    if many:
        run.many(expanded.found, check)
    else:
        run.one(check(expanded.found[0]))
    raise typer.Exit(run.exit_code)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """The SPECs of the command line."""

    model: str | None
    data: str | None
    train_data: str | None
    metric: str | None
    example: str | None

    def model_for(self, target: str) -> nn.Module | str:
        """Return the model to check, or the path of a checkpoint that is checked by itself."""
        if self.model is None and not is_model_spec(target):
            for option in ("data", "train_data", "metric", "example"):
                if getattr(self, option) is not None:
                    name = option.replace("_", "-")
                    raise UsageError(f"--{name}: target must be a model, got {target}. Give its code by --model.")
            return target
        model, _ = load_target(target, self.model, "to check it")
        return model

    def inputs(self) -> dict[str, Any]:
        """Load the data, and the metric."""
        from bnlab.cli.specs import load_data, load_example, load_metric

        found: dict[str, Any] = {}
        if self.data is not None:
            found["data"] = load_data(self.data, "--data")
        if self.train_data is not None:
            found["train_data"] = load_data(self.train_data, "--train-data")
        if self.metric is not None:
            found["metric"] = load_metric(self.metric, "--metric")
        if self.example is not None:
            found["example"] = load_example(self.example, "--example")
        return found


@dataclass
class _Run:
    """Writes diagnoses as they come, and knows what they add up to."""

    format: CheckFormat
    level: Level
    output: Path | None
    found: bool = False
    failed: bool = False
    _kept: list[str] = field(default_factory=list)
    _diagnoses: list[Diagnosis] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 2 if self.failed else int(self.found)

    def one(self, diagnosis: Diagnosis) -> None:
        """Write the whole report of a single target."""
        from bnlab.report import json
        from bnlab.report.text import diagnosis as text

        self._count(diagnosis)
        if self.format is CheckFormat.JSON:
            emit(json.render(diagnosis) + "\n", self.output)
        elif self.format in _WHOLE:
            emit(self._document([diagnosis]), self.output)
        elif self.output is not None:
            emit(text.render(diagnosis, level=self.level) + "\n", self.output)
        else:
            from rich.console import Console

            Console(highlight=False).print(text.renderable(diagnosis, level=self.level))

    def many(self, targets: Sequence[str | BnlabError], check: Callable[[str | BnlabError], Diagnosis]) -> None:
        """Write a line per target, and in text a summary; a target that fails does not stop the others."""
        from rich.text import Text

        from bnlab.report import json
        from bnlab.report.shortening import plain
        from bnlab.report.text import diagnosis as text

        counts: Counter[str] = Counter()
        for target in self._with_progress(targets):
            try:
                diagnosis = check(target)
            except NoBatchNorm as err:
                counts["without BN"] += 1
                self._line(Text(plain(str(err)), style="dim"), to_stderr=self.format is not CheckFormat.TEXT)
                continue
            except BnlabError as err:
                counts["not readable"] += 1
                self._failures.append(str(err))
                self._complain(str(err))
                continue
            self._count(diagnosis)
            summary = diagnosis.summary
            counts.update(checked=1, layers=summary.layers, errors=summary.errors, warnings=summary.warnings)
            if self.format in _WHOLE:
                self._diagnoses.append(diagnosis)
            else:
                as_json = self.format is CheckFormat.JSON
                self._line(json.render_line(diagnosis) if as_json else text.summary_line(diagnosis))
        if self.format is CheckFormat.TEXT:
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
        if self.format in _WHOLE:
            emit(self._document(self._diagnoses), self.output)
        elif self.output is not None:
            emit("".join(f"{line}\n" for line in self._kept), self.output)

    def _document(self, diagnoses: Sequence[Diagnosis]) -> str:
        """Return one page, or one SARIF log, of all targets."""
        if self.format is CheckFormat.SARIF:
            from bnlab.cli.sarif import rules, sources
            from bnlab.report import sarif

            return (
                sarif.render(
                    diagnoses, rules=rules(), sources=sources(diagnoses), level=self.level, failures=self._failures
                )
                + "\n"
            )
        from bnlab.report.html import diagnosis as page

        if len(diagnoses) == 1:
            return page.render(diagnoses[0], level=self.level)
        return page.render_many(diagnoses, level=self.level)

    def _complain(self, message: str) -> None:
        self.failed = True
        complain(message)

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


def _settings(
    select: Sequence[str] | None,
    ignore: Sequence[str] | None,
    momentum: str | None,
    eps: str | None,
    per_channel: bool,
) -> Settings:
    from bnlab.diagnosis.settings import Settings

    return Settings.of(
        select=None if select is None else [code.strip() for part in select for code in part.split(",")],
        ignore=dict(_reason(item) for item in ignore or ()),
        momentum=_number("--momentum", momentum),
        eps=_number("--eps", eps),
        per_channel=per_channel,
    )


def _checker(given: _Given, settings: Settings) -> Callable[[str | BnlabError], Diagnosis]:
    """Return what checks one target; every option is validated before the first target is read."""
    from bnlab.diagnosis.check import check_with

    loaded = given.inputs()

    def check(target: str | BnlabError) -> Diagnosis:
        if isinstance(target, BnlabError):
            raise target
        found = given.model_for(target)
        if not loaded:
            return check_with(found, settings, name=target)
        from bnlab.observe.survey import Inputs
        from bnlab.progress import reporting

        with reporting() as advance:
            return check_with(found, settings, inputs=Inputs(**loaded, advance=advance), name=target)

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
