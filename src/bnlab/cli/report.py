"""`bnlab report`: draw a saved record, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnlab.cli.options import OutputPath
from bnlab.cli.output import Drawing, check_output, emit
from bnlab.cli.saved_records import SavedRecord, read_saved
from bnlab.errors import UsageError
from bnlab.records import Changes, DiagnosisRecord, ExperimentRecord

__all__ = ["command"]


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.json", help="What --format json printed, or a record of the lab; JSON Lines hold several."
        ),
    ],
    format_: Annotated[Drawing, typer.Option("--format", help="How it is drawn.")] = Drawing.TEXT,
    output: OutputPath = None,
) -> None:
    """Draw a saved diagnosis, receipt or experiment; needs no torch.

    Exit code 0: drawn. 2: the file could not be read or written.
    """
    if output is not None:
        check_output(output, [str(file)])
    records = read_saved(file)
    emit(_page(records, file) if format_ is Drawing.HTML else _text(records), output)


def _page(records: list[SavedRecord], file: Path) -> str:
    from bnlab.report.html import diagnosis, experiments, receipt

    if all(isinstance(record, ExperimentRecord) for record in records):
        found = [record for record in records if isinstance(record, ExperimentRecord)]
        return experiments.render(found, interactive=len(found) == 1)
    if all(isinstance(record, DiagnosisRecord) for record in records):
        diagnoses = [record for record in records if isinstance(record, DiagnosisRecord)]
        return diagnosis.render(diagnoses[0]) if len(diagnoses) == 1 else diagnosis.render_many(diagnoses)
    first = records[0]
    if len(records) > 1 or not isinstance(first, Changes):
        raise UsageError(f"{file}: records of a page must be of one kind, and receipts one by one, got {len(records)}.")
    return receipt.render(first)


def _text(records: list[SavedRecord]) -> str:
    return "\n\n".join(map(_one, records)) + "\n"


def _one(record: SavedRecord) -> str:
    from bnlab.report.text import diagnosis as text
    from bnlab.report.text import experiment, receipt

    if isinstance(record, DiagnosisRecord):
        return text.render(record)
    return receipt.render_changes(record) if isinstance(record, Changes) else experiment.render(record)
