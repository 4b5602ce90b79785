"""`bnlab lab` runs experiments on BN. Each ends in a verdict, a number and a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.atomic_file import write_whole
from bnlab.cli.options import OutputPath
from bnlab.cli.output import Drawing, PageFormat, check_output, print_error, print_notice, write_text
from bnlab.errors import BnlabError, UsageError
from bnlab.wording import error_line

if TYPE_CHECKING:
    from bnlab.cli.saved_records import FolderRecords
    from bnlab.lab import Result
    from bnlab.lab.experiment import Experiment
    from bnlab.records import ExperimentRecord

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run experiments on batch normalization.")

_FOLDER = Path("lab-records")


class Picture(str, Enum):
    """File formats of a picture."""

    SVG = "svg"
    PNG = "png"
    HTML = "html"


@app.command("list")
def list_() -> None:
    """List every experiment with its claims."""
    from bnlab.lab.catalog import EXPERIMENTS

    for experiment in EXPERIMENTS:
        print(f"{experiment.name:24} {experiment.title}")
        for claim in experiment.claims:
            print(f"{'':26}{claim.text}")


@app.command("run")
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experiments to run; all runs every one.")],
    full: Annotated[
        bool, typer.Option("--full", help="Use settings as large as those of the papers; takes hours.")
    ] = False,
    seeds: Annotated[int, typer.Option(metavar="N", help="Number of seeds, at least 3.")] = 3,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with data sets, instead of $BNLAB_DATA.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the records; a record that exists is not computed again.")
    ] = _FOLDER,
    again: Annotated[bool, typer.Option("--again", help="Run even if the record exists.")] = False,
    figure: Annotated[Picture | None, typer.Option(help="Draw each record beside it; needs the report extra.")] = None,
    format_: Annotated[
        PageFormat,
        typer.Option("--format", help="json writes one record per line; html writes one page of all records."),
    ] = PageFormat.TEXT,
    output: OutputPath = None,
) -> None:
    """Run experiments, print the claims with their verdicts, and keep the records.

    Exit code 0: every experiment ran, whatever its verdicts are. 2: an experiment could not run.
    """
    from bnlab.lab import run as run_experiment
    from bnlab.lab.catalog import EXPERIMENTS, by_name

    chosen = list(EXPERIMENTS) if names == ["all"] else [by_name(name) for name in names]
    if figure is not None:
        _require_drawing()
    if output is not None:
        check_output(output, [])
    at_once = output is None and format_ is not PageFormat.HTML
    results: list[Result] = []
    failed = False
    with _progress() as follow:
        for experiment in chosen:
            with follow(experiment) as advance:
                try:
                    result = run_experiment(
                        experiment,
                        full=full,
                        seeds=seeds,
                        data_dir=data_dir,
                        folder=folder,
                        again=again,
                        advance=advance,
                    )
                except BnlabError as error:
                    failed = True
                    print_error(str(error))
                    continue
            results.append(result)
            if at_once:
                _show(result, format_)
            if figure is not None:
                _draw(result, folder, figure)
    if results and not at_once:
        write_text(_document(results, format_), output)
    raise typer.Exit(2 if failed else 0)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the records.")] = _FOLDER,
    format_: Annotated[
        Drawing, typer.Option("--format", help="Format of the report; html writes one page.")
    ] = Drawing.HTML,
    output: OutputPath = None,
) -> None:
    """Draw every record of a folder, claim by claim.

    If records have the same settings, only the last one written is drawn. Files that hold something else are passed
    over and named on stderr.

    Exit code 0: all records are drawn. 2: a record is damaged (the others are still drawn), or there is none.
    """
    from bnlab.cli.saved_records import read_folder

    if output is not None:
        check_output(output, [])
    folder_records = read_folder(folder)
    document = _whole_document(folder_records, PageFormat(format_.value))
    for reason in folder_records.passed_over:
        print_notice(f"passed over: {reason}")
    for error in folder_records.errors:
        print_error(error)
    if folder_records.records:
        write_text(document, output)
    elif not folder_records.errors:
        raise UsageError(
            f"--folder: folder must hold a record of an experiment, got none in {folder}. "
            "Run one: bnlab lab run train-eval."
        )
    raise typer.Exit(2 if folder_records.errors else 0)


def _whole_document(folder_records: FolderRecords, format_: PageFormat) -> str:
    """Return the records as one document, without those that cannot be drawn, which become errors."""
    try:
        return _document(folder_records.records, format_) if folder_records.records else ""
    except (BnlabError, MemoryError):
        raise
    except Exception:
        reasons = {id(record): _reason_against(record, format_) for record in folder_records.records}
        folder_records.errors += filter(None, reasons.values())
        folder_records.records = [record for record in folder_records.records if not reasons[id(record)]]
        return _document(folder_records.records, format_) if folder_records.records else ""


def _reason_against(record: ExperimentRecord, format_: PageFormat) -> str:
    """Return why a record cannot be drawn; "" if it can."""
    try:
        _document([record], format_)
    except Exception as error:
        return f"{record.name}: record must be consistent to be drawn, got {error_line(error)}."
    return ""


def _document(records: Sequence[ExperimentRecord], format_: PageFormat) -> str:
    """Return all records as one document."""
    if format_ is PageFormat.JSON:
        return "".join(f"{record.dumps()}\n" for record in records)
    if format_ is PageFormat.HTML:
        from bnlab.report.html import experiments

        return experiments.render(records, interactive=len(records) == 1)
    from bnlab.report.text.experiment import render

    return "\n\n".join(map(render, records)) + "\n"


def _show(result: Result, format_: PageFormat) -> None:
    if format_ is PageFormat.JSON:
        print(result.dumps())
        return
    from rich.console import Console

    from bnlab.report.text.experiment import renderable

    Console(highlight=False).print(renderable(result))


def _draw(result: Result, folder: Path, kind: Picture) -> None:
    from bnlab.report import figure

    draw: dict[Picture, Callable[[Any], str | bytes]] = {
        Picture.SVG: figure.svg,
        Picture.PNG: figure.png,
        Picture.HTML: figure.html,
    }
    drawn = draw[kind](result)
    path = folder / f"{result.name}-{result.profile}.{kind.value}"
    write_whole(drawn.encode() if isinstance(drawn, str) else drawn, path)
    print(f"drawn: {path}", file=sys.stderr)


def _require_drawing() -> None:
    from bnlab.report import figure

    if not figure.can_draw():
        raise UsageError(
            "--figure: altair and vl-convert must be installed, got one of them or none. "
            "Install them: pip install 'bnlab[report]'."
        )


@contextmanager
def _progress() -> Iterator[Callable[[Experiment[Any]], Any]]:
    """Show the progress and the remaining time of each experiment on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:

        @contextmanager
        def follow(experiment: Experiment[Any]) -> Iterator[Callable[[float], None]]:
            task = bar.add_task(experiment.name, total=1.0)
            try:
                yield lambda share: bar.update(task, completed=share)
            finally:
                bar.remove_task(task)

        yield follow
