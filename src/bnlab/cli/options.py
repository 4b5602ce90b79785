"""Options that several commands share, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnlab.records import Level

__all__ = [
    "DataSpec",
    "ExampleSpec",
    "LossSpec",
    "LowestLevel",
    "MetricSpec",
    "Minimize",
    "ModelSpec",
    "OutputPath",
    "RequiredDataSpec",
    "TrainDataSpec",
]

_DATA = typer.Option(
    metavar="SPEC",
    help="Data that the model will see: package.module:callable, or digits, mnist or cifar10, with :train or :test.",
)

ModelSpec = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="package.module:callable that builds the model; a checkpoint is loaded into it."),
]
DataSpec = Annotated[str | None, _DATA]
RequiredDataSpec = Annotated[str, _DATA]
TrainDataSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="Data that the model was trained on; a repair recomputes the statistics from it."
    ),
]
MetricSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="accuracy, loss, or package.module:callable; higher is better, except with --minimize."
    ),
]
Minimize = Annotated[bool, typer.Option("--minimize", help="The metric is better if it is lower.")]
LossSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="package.module:callable, loss(model, batch) -> scalar; decides whether stale statistics are recomputed.",
    ),
]
ExampleSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="One batch, to see what the model executes: package.module:callable, or a name as for --data.",
    ),
]
OutputPath = Annotated[Path | None, typer.Option(metavar="PATH", help="Write here instead of to stdout.")]
LowestLevel = Annotated[Level, typer.Option(help="Lowest level of findings that count and make the exit code 1.")]
