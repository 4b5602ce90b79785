"""Options that several commands share, each with one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnlab.records import Level

__all__ = [
    "DataSpec",
    "DeviceName",
    "ExampleSpec",
    "ForwardSpec",
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
    help="Data that the model will see: package.module:callable or file.py:callable that returns the batches, or "
    "digits, mnist or cifar10, with :train or :test.",
)

ModelSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="package.module:callable or file.py:callable that builds the model; a checkpoint is loaded into it.",
    ),
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
        metavar="SPEC",
        help="accuracy, loss or miou, or a callable, metric(model, data) -> float; higher is better, except for loss "
        "and with --minimize. miou:0 ignores the label 0; without a number, -100 and 255 are ignored.",
    ),
]
Minimize = Annotated[bool, typer.Option("--minimize", help="The metric is better if it is lower.")]
LossSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="A callable, loss(model, batch) -> scalar; decides whether stale statistics are recomputed.",
    ),
]
ExampleSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="One batch, to see what the model executes: a callable that returns it or a loader, or a name as for "
        "--data.",
    ),
]
ForwardSpec = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="A callable, forward(model, batch) -> output, for a model that cannot be called on a batch directly.",
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Device that the model runs on, such as cuda, cuda:1 or mps; by default where its code puts it.",
    ),
]
OutputPath = Annotated[Path | None, typer.Option(metavar="PATH", help="Write here instead of to stdout.")]
LowestLevel = Annotated[Level, typer.Option(help="Lowest level of findings that count and make the exit code 1.")]
