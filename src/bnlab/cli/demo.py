"""`bnlab demo`: a classic mishap, from training to diagnosis."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnlab.cli._output import write_whole

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["command"]


def command(
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Keep the checkpoint here; by default it is thrown away.")
    ] = None,
) -> None:
    """Train a small CNN whose running statistics hardly move, and check its checkpoint."""
    from rich.console import Console

    with tempfile.TemporaryDirectory() as folder:
        _demonstrate(output or Path(folder, "digits.pt"), Console(highlight=False))


def _demonstrate(path: Path, console: Console) -> None:
    import torch
    from rich.console import Console as RichConsole
    from rich.progress import Progress

    from bnlab.diagnosis import Settings, check_with
    from bnlab.lab.datasets import load
    from bnlab.lab.metrics import accuracy
    from bnlab.lab.stuck_statistics import Config, train
    from bnlab.observe.survey import Inputs
    from bnlab.records import Level
    from bnlab.report.text import renderable

    config = Config()
    console.print(
        f"Training a CNN with three BN layers on scikit-learn's digits: {config.epochs} epochs, "
        f"momentum {config.momentum}."
    )
    errors = RichConsole(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("training", total=config.epochs)
        outcome = train(config, progress=lambda epoch: bar.update(task, completed=epoch))

    buffer = io.BytesIO()
    torch.save(outcome.model.state_dict(), buffer)
    write_whole(buffer.getvalue(), path)
    stated = f"--momentum {config.momentum}"
    console.print(f"The same weights on the same {outcome.held_out} held-out images:\n")
    console.print(f"  accuracy with batch statistics    {outcome.accuracy_batch:.3f}")
    console.print(
        f"  accuracy with running statistics  {outcome.accuracy_running:.3f}   (this is what eval mode does)\n"
    )
    console.print(
        f"Its state dict is saved. Here is what the file alone tells:\n\n$ bnlab check {path.name} {stated}\n"
    )
    console.print(
        renderable(check_with(path, Settings.of(momentum=config.momentum), name=path.name), level=Level.WARNING)
    )
    unstated = check_with(path, Settings.of()).summary
    inputs = Inputs(data=load("digits:test"), train_data=load("digits:train"), metric=accuracy)
    diagnosis = check_with(outcome.model, Settings.of(), inputs=inputs, name="the model")
    console.print(
        "\nWith the model and its data, `bnlab check package.module:model --data ... --metric accuracy` says:\n"
    )
    console.print(f"  {diagnosis.conclusion}.", style="bold")
    console.print(
        f"\nA state dict does not hold the momentum: at the assumed 0.1 the same file has {unstated.errors} errors and "
        f"{unstated.warnings} warnings. State {stated} as the run did."
    )
