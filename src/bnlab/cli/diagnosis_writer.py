"""Writes the diagnoses of `bnlab check` one after the other, and counts their problems for the summary.

The exit code depends on the findings.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.cli.output import print_error, write_text
from bnlab.cli.unexpected import unexpected_line
from bnlab.errors import BnlabError, NoBatchNorm
from bnlab.records import Level, Status
from bnlab.wording import counted

if TYPE_CHECKING:
    from rich.text import Text

    from bnlab.diagnosis.check import Diagnosis

__all__ = ["CheckFormat", "DiagnosisWriter"]


class CheckFormat(str, Enum):
    """The formats of `bnlab check`."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    HTML = "html"


_WHOLE = (CheckFormat.SARIF, CheckFormat.HTML)
"""Formats that put all targets into one document."""


@dataclass
class DiagnosisWriter:
    """Writes one diagnosis as a full report, or many diagnoses with one line each.

    Attributes:
        format: The format of the output.
        level: Lowest level of findings that count.
        output: The file to write; None for stdout.
        has_findings: Whether a diagnosis has findings that count.
        has_failed: Whether a target could not be checked, or a check crashed.
    """

    format: CheckFormat
    level: Level
    output: Path | None
    has_findings: bool = False
    has_failed: bool = False
    _counts: Counter[str] = field(default_factory=Counter)
    _lines: list[str] = field(default_factory=list)
    _diagnoses: list[Diagnosis] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """2 if a target or a check failed, else 1 if there are findings that count, else 0."""
        return 2 if self.has_failed else int(self.has_findings)

    def write_one(self, diagnosis: Diagnosis) -> None:
        """Write the full report of a single target."""
        from bnlab.report import json
        from bnlab.report.text import diagnosis as text

        self._count(diagnosis)
        if self.format is CheckFormat.JSON:
            write_text(json.render(diagnosis) + "\n", self.output)
        elif self.format in _WHOLE:
            write_text(self._document([diagnosis]), self.output)
        elif self.output is not None:
            write_text(text.render(diagnosis, level=self.level) + "\n", self.output)
        else:
            from rich.console import Console

            Console(highlight=False).print(text.renderable(diagnosis, level=self.level))

    def write_many(self, targets: Sequence[str | BnlabError], check: Callable[[str | BnlabError], Diagnosis]) -> None:
        """Write one line for each target and, as text, a summary. A target that fails does not stop the others."""
        for target in self._with_progress(targets):
            self._check_and_write(target, check)
        if self.format is CheckFormat.TEXT:
            self._write_line(self._summary(len(targets)))
        if self._counts["without BN"] == len(targets):
            self._report_failure("TARGET: at least one must hold batch normalization, got none.")
        if self.format in _WHOLE:
            write_text(self._document(self._diagnoses), self.output)
        elif self.output is not None:
            write_text("".join(f"{line}\n" for line in self._lines), self.output)

    def _check_and_write(self, target: str | BnlabError, check: Callable[[str | BnlabError], Diagnosis]) -> None:
        from rich.text import Text

        from bnlab.report import json
        from bnlab.report.shortening import plain
        from bnlab.report.text import diagnosis as text

        try:
            diagnosis = check(target)
        except NoBatchNorm as err:
            self._counts["without BN"] += 1
            self._write_line(Text(plain(str(err)), style="dim"), to_stderr=self.format is not CheckFormat.TEXT)
            return
        except Exception as err:  # a crash on one target must not stop the others
            message = str(err) if isinstance(err, BnlabError) else unexpected_line(err, str(target))
            self._counts["not readable"] += 1
            self._failures.append(message)
            self._report_failure(message)
            return
        self._count(diagnosis)
        if self.format in _WHOLE:
            self._diagnoses.append(diagnosis)
        elif self.format is CheckFormat.JSON:
            self._write_line(json.render_line(diagnosis))
        else:
            self._write_line(text.summary_line(diagnosis))

    def _summary(self, targets: int) -> Text:
        from rich.text import Text

        counts = self._counts
        return Text(
            f"{counted(targets, 'target')}: {counts['checked']} checked with {counted(counts['layers'], 'BN layer')}, "
            f"{counted(counts['errors'], 'error')} and {counted(counts['warnings'], 'warning')}; "
            f"{counts['without BN'] + counts['folded']} without BN, {counts['not readable']} not readable",
            style="bold",
        )

    def _document(self, diagnoses: Sequence[Diagnosis]) -> str:
        """Return one page, or one SARIF log, for all targets."""
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

    def _report_failure(self, message: str) -> None:
        self.has_failed = True
        print_error(message)

    def _count(self, diagnosis: Diagnosis) -> None:
        from bnlab.report.problems import problems_of

        levels = Counter(problem.level for problem in problems_of(diagnosis))
        # a graph without BN nodes is checked for what folding left, so it is no failure
        is_folded = not diagnosis.layers and diagnosis.target.kind == "checkpoint"
        self._counts.update({"folded" if is_folded else "checked": 1, "layers": diagnosis.summary.layers})
        self._counts.update(errors=levels[Level.ERROR], warnings=levels[Level.WARNING])
        self.has_findings |= any(finding.level.at_least(self.level) for finding in diagnosis.findings)
        if diagnosis.failure is not None:
            self._report_failure(f"{diagnosis.target.name}: {diagnosis.failure}")
        for outcome in diagnosis.outcomes:
            if outcome.status is Status.CRASHED:
                self._report_failure(f"{diagnosis.target.name}: {outcome.code} crashed: {outcome.reason}")

    def _write_line(self, line: Text | str, *, to_stderr: bool = False) -> None:
        from rich.console import Console

        if self.output is not None and not to_stderr:
            self._lines.append(str(line))
        elif isinstance(line, str):
            print(line)
        else:
            Console(stderr=to_stderr, highlight=False).print(line, soft_wrap=True)

    def _with_progress(self, targets: Sequence[str | BnlabError]) -> Iterable[str | BnlabError]:
        """Show a progress bar on stderr, unless the lines themselves appear on the terminal."""
        if not sys.stderr.isatty() or (sys.stdout.isatty() and self.output is None):
            return targets
        from rich.console import Console
        from rich.progress import track

        return track(targets, description="checking", console=Console(stderr=True), transient=True)
