"""`bnlab lab`: run experiments on BN, each ending in a verdict, a number and a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli._output import Format, complain, write_whole
from bnlab.errors import BnlabError, UsageError

if TYPE_CHECKING:
    from bnlab.lab import Result
    from bnlab.lab._experiment import Experiment

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run experiments on batch normalization.")

_FOLDER = Path("lab-records")


class Picture(str, Enum):
    """What a picture is drawn as."""

    SVG = "svg"
    PNG = "png"
    HTML = "html"


@app.command("list")
def list_() -> None:
    """Name every experiment, with what it decides."""
    from bnlab.lab._catalog import EXPERIMENTS

    for experiment in EXPERIMENTS:
        print(f"{experiment.name:24} {experiment.title}")
        for claim in experiment.claims:
            print(f"{'':26}{claim.text}")


@app.command("run")
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experiments; all stands for every one.")],
    full: Annotated[bool, typer.Option("--full", help="With the settings of the paper's size: hours.")] = False,
    seeds: Annotated[int, typer.Option(metavar="N", help="How many seeds, at least 3.")] = 3,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with data sets, instead of $BNLAB_DATA.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where records are kept; one that is there is not computed again.")
    ] = _FOLDER,
    again: Annotated[bool, typer.Option("--again", help="Run even if the record is there.")] = False,
    figure: Annotated[Picture | None, typer.Option(help="Draw each record beside it; needs the report extra.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="json is one record a line.")] = Format.TEXT,
) -> None:
    """Run experiments, print the claims with their verdicts, and keep the records.

    Exit code 0: every experiment ran, whatever its verdicts. 2: one could not.
    """
    from bnlab.lab import run as run_experiment
    from bnlab.lab._catalog import EXPERIMENTS, by_name

    chosen = list(EXPERIMENTS) if names == ["all"] else [by_name(name) for name in names]
    if figure is not None:
        _require_drawing()
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
                    complain(str(error))
                    continue
            _show(result, format_)
            if figure is not None:
                _draw(result, folder, figure)
    raise typer.Exit(2 if failed else 0)


def _show(result: Result, format_: Format) -> None:
    if format_ is Format.JSON:
        print(result.dumps())
        return
    from rich.console import Console

    from bnlab.report.experiment import renderable

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
        raise UsageError("--figure: packages must be installed, got none. Install them: pip install 'bnlab[report]'.")


@contextmanager
def _progress() -> Iterator[Callable[[Experiment[Any]], Any]]:
    """Show on stderr, on a terminal only, how far each experiment is and how long it still takes."""
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
