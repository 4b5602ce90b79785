"""`bnlab report` draws a saved record. It does not need torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnlab.cli.options import OutputPath
from bnlab.cli.output import Drawing, check_output, write_text
from bnlab.cli.saved_records import SavedRecord, read_saved
from bnlab.errors import BnlabError, DamagedFile, UsageError
from bnlab.records import Changes, DiagnosisRecord, ExperimentRecord
from bnlab.wording import error_line

__all__ = ["command"]


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.json", help="Output of --format json, or a record of the lab; JSON Lines hold several."
        ),
    ],
    format_: Annotated[Drawing, typer.Option("--format", help="Format of the report.")] = Drawing.TEXT,
    output: OutputPath = None,
) -> None:
    """Draw a saved diagnosis, receipt or experiment. This needs no torch.

    Exit code 0: the record is drawn. 2: a file could not be read or written.
    """
    if output is not None:
        check_output(output, [str(file)])
    records = read_saved(file)
    write_text(_drawn(records, file, format_), output)


def _drawn(records: list[SavedRecord], file: Path, format_: Drawing) -> str:
    """Return the drawing of the records.

    Raises:
        UsageError: If no page holds records of these kinds together.
        DamagedFile: If the parts of a record contradict each other, so that it cannot be drawn.
    """
    try:
        return _page(records, file) if format_ is Drawing.HTML else _text(records)
    except (BnlabError, MemoryError):
        raise
    except Exception as error:
        raise DamagedFile(f"{file}: record must be consistent to be drawn, got {error_line(error)}.") from error


def _page(records: list[SavedRecord], file: Path) -> str:
    from bnlab.report.html import diagnosis, experiments, receipt

    if all(isinstance(record, ExperimentRecord) for record in records):
        experiment_records = [record for record in records if isinstance(record, ExperimentRecord)]
        return experiments.render(experiment_records, interactive=len(experiment_records) == 1)
    if all(isinstance(record, DiagnosisRecord) for record in records):
        diagnoses = [record for record in records if isinstance(record, DiagnosisRecord)]
        return diagnosis.render(diagnoses[0]) if len(diagnoses) == 1 else diagnosis.render_many(diagnoses)
    first = records[0]
    if len(records) > 1 or not isinstance(first, Changes):
        raise UsageError(
            f"{file}: file must hold records of one kind, or one receipt, for a page, got {len(records)} records."
        )
    return receipt.render(first)


def _text(records: list[SavedRecord]) -> str:
    return "\n\n".join(map(_one, records)) + "\n"


def _one(record: SavedRecord) -> str:
    from bnlab.report.text import diagnosis as text
    from bnlab.report.text import experiment, receipt

    if isinstance(record, DiagnosisRecord):
        return text.render(record)
    return receipt.render_changes(record) if isinstance(record, Changes) else experiment.render(record)
