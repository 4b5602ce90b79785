"""`bnlab demo` shows a classic mishap, from training to a repair that is verified."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnlab.cli.output import check_output, write_output

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from bnlab.lab.stuck_statistics import Config, TrainedNetwork

__all__ = ["command"]


def command(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Keep the checkpoint here and the repaired one beside it; by default both are deleted."
        ),
    ] = None,
) -> None:
    """Train a small CNN whose running statistics hardly move, check it, repair it, and measure its accuracy."""
    from rich.console import Console

    if output is not None:
        for path in (output, _beside(output)):
            check_output(path, [])
    with tempfile.TemporaryDirectory() as folder:
        _demonstrate(output or Path(folder, "digits.pt"), Console(highlight=False))


def _demonstrate(path: Path, console: Console) -> None:
    from bnlab.lab.stuck_statistics import Config

    config = Config()
    outcome = _trained(config, console)
    _write(outcome.model, path)
    console.print(f"The same weights on the same {outcome.held_out} held-out images:\n")
    console.print(f"  accuracy with batch statistics    {outcome.accuracy_batch:.3f}")
    console.print(
        f"  accuracy with running statistics  {outcome.accuracy_running:.3f}   (this is what eval mode does)\n"
    )
    _diagnose(path, outcome.model, config, console)
    _repair(path, outcome.model, console)


def _trained(config: Config, console: Console) -> TrainedNetwork:
    from rich.console import Console as RichConsole
    from rich.progress import Progress

    from bnlab.lab.stuck_statistics import train

    console.print(
        f"Training a CNN with three BN layers on scikit-learn's digits: {config.epochs} epochs, "
        f"momentum {config.momentum}."
    )
    errors = RichConsole(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("training", total=config.epochs)
        return train(config, progress=lambda epoch: bar.update(task, completed=epoch))


def _diagnose(path: Path, model: nn.Module, config: Config, console: Console) -> None:
    from bnlab.diagnosis.check import check_with
    from bnlab.diagnosis.settings import Settings
    from bnlab.lab.datasets import load
    from bnlab.lab.metrics import accuracy
    from bnlab.observe.inputs import Inputs
    from bnlab.records import Level
    from bnlab.report.problems import count, problems_of
    from bnlab.report.text.diagnosis import renderable

    stated = f"--momentum {config.momentum}"
    console.print(f"Its state dict is saved. The file alone shows this:\n\n$ bnlab check {path.name} {stated}\n")
    console.print(
        renderable(check_with(path, Settings.of(momentum=config.momentum), name=path.name), level=Level.WARNING)
    )
    unstated = problems_of(check_with(path, Settings.of()))
    console.print(
        f"\nA state dict does not hold the momentum. With the default of 0.1 the same file has "
        f"{count(unstated, Level.ERROR)} and {count(unstated, Level.WARNING)}. "
        f"Pass {stated}, the value of the training run."
    )
    inputs = Inputs(data=load("digits:test"), train_data=load("digits:train"), metric=accuracy)
    diagnosis = check_with(model, Settings.of(), inputs=inputs, name="the model")
    console.print(
        "\nWith the model and its data, `bnlab check package.module:model --data ... --metric accuracy` reports:\n"
    )
    console.print(f"  {diagnosis.conclusion}.", style="bold")


def _repair(path: Path, model: nn.Module, console: Console) -> None:
    """Repair the model, load the new file into a fresh network and measure its accuracy."""
    from bnlab.lab.datasets import load
    from bnlab.lab.metrics import accuracy
    from bnlab.lab.stuck_statistics import build_network
    from bnlab.observe.files.load import load_into
    from bnlab.repairing import repair

    mended = _beside(path)
    console.print(
        f"\nRepair it with the training images, and keep the result only if the accuracy does not get worse:\n\n"
        f"$ bnlab repair {path.name} --model bnlab.lab.stuck_statistics:build_network --data digits "
        f"--train-data digits:train --metric accuracy --output {mended.name}\n",
        soft_wrap=True,
    )
    receipt = repair(model, data=load("digits:test"), train_data=load("digits:train"), metric=accuracy)
    console.print(str(receipt), soft_wrap=True)
    _write(model, mended)
    fresh = build_network()
    load_into(fresh, mended)
    console.print(
        f"\nThe new file, loaded into a fresh network, has an accuracy of "
        f"{accuracy(fresh.eval(), load('digits:test')):.3f} in eval mode on the held-out images.",
        style="bold",
    )


def _beside(path: Path) -> Path:
    """Return the path of the repaired checkpoint."""
    return path.with_stem(f"{path.stem}-mended")


def _write(model: nn.Module, path: Path) -> None:
    from bnlab.observe.files.load import state_dict_file

    write_output(state_dict_file(model.state_dict(), path.suffix), path)
