"""`bnlab check` reports what is wrong with the BN state of checkpoints and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli.device import device_of, move
from bnlab.cli.diagnosis_writer import CheckFormat, DiagnosisWriter
from bnlab.cli.options import (
    DataSpec,
    DeviceName,
    ExampleSpec,
    ForwardSpec,
    LossSpec,
    LowestLevel,
    MetricSpec,
    Minimize,
    ModelSpec,
    OutputPath,
    TrainDataSpec,
)
from bnlab.cli.output import check_output, prints_on_stderr, require_pages
from bnlab.cli.targets import expand, is_model_spec, load_target
from bnlab.errors import BnlabError, UsageError
from bnlab.records import Level

if TYPE_CHECKING:
    from torch import nn

    from bnlab.diagnosis.check import Diagnosis
    from bnlab.diagnosis.settings import Settings

__all__ = ["command"]


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Checkpoints, folders, globs, or package.module:callable or file.py:callable that builds a model.",
        ),
    ],
    model: ModelSpec = None,
    data: DataSpec = None,
    train_data: TrainDataSpec = None,
    metric: MetricSpec = None,
    minimize: Minimize = False,
    loss: LossSpec = None,
    example: ExampleSpec = None,
    forward: ForwardSpec = None,
    device: DeviceName = None,
    select: Annotated[
        list[str] | None, typer.Option(metavar="CODES", help="Checks to run, comma-separated; BN1 is all of BN1xx.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CODE=REASON", help="Drop a check's findings, and record the reason.")
    ] = None,
    level: LowestLevel = Level.WARNING,
    format_: Annotated[
        CheckFormat,
        typer.Option(
            "--format",
            help="json: one object, or JSON Lines for several targets; html: a page; sarif: for code scanning.",
        ),
    ] = CheckFormat.TEXT,
    output: OutputPath = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Write a value for each channel into the JSON; html always has them.")
    ] = False,
    momentum: Annotated[
        str | None, typer.Option(metavar="X", help="Momentum of the training run, or none for a cumulative average.")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(metavar="X", help="eps of the BN layers, or infer with --train-data.")
    ] = None,
) -> None:
    """Check the batch normalization state of checkpoints or models.

    Exit code 0: there is no finding at or above --level. 1: there is one. 2: a target could not be checked.
    """
    expanded = expand(targets)
    if output is not None:
        check_output(output, expanded.names)
    if format_ is CheckFormat.HTML:
        require_pages()
    per_channel |= format_ is CheckFormat.HTML and not expanded.many
    specs = _Specs(
        model=model,
        data=data,
        train_data=train_data,
        metric=metric,
        minimize=minimize,
        loss=loss,
        example=example,
        forward=forward,
        device=device,
    )
    check = _checker(specs, _settings(select, ignore, momentum, eps, per_channel))
    writer = DiagnosisWriter(format_, level, output)
    if expanded.many:
        writer.write_many(expanded.items, check)
    else:
        writer.write_one(check(expanded.items[0]))
    raise typer.Exit(writer.exit_code)


@dataclass(frozen=True, kw_only=True)
class _Specs:
    """The options of the command line that need a model."""

    model: str | None
    data: str | None
    train_data: str | None
    metric: str | None
    minimize: bool
    loss: str | None
    example: str | None
    forward: str | None
    device: str | None

    def model_for(self, target: str) -> nn.Module | str:
        """Return the model to check, or the path of a checkpoint that is checked without a model."""
        if self.model is None and not is_model_spec(target):
            for option in ("data", "train_data", "metric", "loss", "example", "forward", "device"):
                if getattr(self, option) is not None:
                    name = option.replace("_", "-")
                    raise UsageError(f"--{name}: target must be a model, got {target}. Name its code with --model.")
            return target
        model, _ = load_target(target, self.model, "to check it")
        move(model, self.device)
        return model

    def inputs(self) -> dict[str, Any]:
        """Load the data, the metric, the loss, the example and the forward."""
        from bnlab.cli.specs import load_data, load_example, load_forward, load_loss, load_metric

        inputs: dict[str, Any] = {}
        if self.data is not None:
            inputs["data"] = load_data(self.data, "--data")
        if self.train_data is not None:
            inputs["train_data"] = load_data(self.train_data, "--train-data")
        if self.metric is not None:
            inputs["metric"] = load_metric(self.metric, "--metric")
            inputs["lower_is_better"] = self.minimize
        if self.loss is not None:
            inputs["loss"] = load_loss(self.loss, "--loss")
        if self.example is not None:
            inputs["example"] = load_example(self.example, "--example")
        if self.forward is not None:
            inputs["forward"] = load_forward(self.forward, "--forward")
        return inputs


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
        ignore=dict(_code_and_reason(item) for item in ignore or ()),
        momentum=_number("--momentum", momentum),
        eps=_number("--eps", eps),
        per_channel=per_channel,
    )


def _checker(specs: _Specs, settings: Settings) -> Callable[[str | BnlabError], Diagnosis]:
    """Return a function that checks one target. Every option is validated before the first target is read."""
    from bnlab.diagnosis.check import check_with

    inputs = specs.inputs()
    if specs.device is not None:
        device_of(specs.device)

    def check(target: str | BnlabError) -> Diagnosis:
        if isinstance(target, BnlabError):
            raise target
        subject = specs.model_for(target)
        if not inputs:
            return check_with(subject, settings, name=target)
        from bnlab.observe.inputs import Inputs
        from bnlab.progress import reporting

        with prints_on_stderr(), reporting() as advance:
            return check_with(subject, settings, inputs=Inputs(**inputs, advance=advance), name=target)

    return check


def _code_and_reason(item: str) -> tuple[str, str]:
    code, equals, reason = item.partition("=")
    if not equals:
        raise UsageError(f"--ignore: value must be CODE=REASON, got {item!r}.")
    return code.strip(), reason


def _number(option: str, text: str | None) -> Any:
    """Return the number. "none" stands for None, and an option that is not set for "assumed"."""
    if text is None:
        return "assumed"
    if text.lower() == "none" and option == "--momentum":
        return None
    if text.lower() == "infer":
        return "infer"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: value must be a number, got {text!r}.") from None
