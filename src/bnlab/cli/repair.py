"""`bnlab repair` repairs the BN layers of a model, verifies the repair and writes a new file."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnlab.cli.device import move
from bnlab.cli.options import (
    DeviceName,
    ForwardSpec,
    LossSpec,
    LowestLevel,
    MetricSpec,
    Minimize,
    ModelSpec,
    RequiredDataSpec,
    TrainDataSpec,
)
from bnlab.cli.output import (
    PageFormat,
    check_output,
    print_notice,
    prints_on_stderr,
    require_pages,
    show_receipt,
    write_output,
)
from bnlab.cli.specs import load_data, load_forward, load_loss, load_metric
from bnlab.cli.targets import load_target
from bnlab.errors import UsageError
from bnlab.records import Level, Safety, Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bnlab.observe.files.load import CheckpointFile
    from bnlab.records import Changes

__all__ = ["command"]


class HighestSafety(str, Enum):
    """The strongest kind of change that a repair may make."""

    EXACT = "exact"
    STATISTICS = "statistics"
    BEHAVIOUR = "behaviour"


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A checkpoint, or package.module:callable or file.py:callable that builds a model."
        ),
    ],
    data: RequiredDataSpec,
    model: ModelSpec = None,
    train_data: TrainDataSpec = None,
    metric: MetricSpec = None,
    minimize: Minimize = False,
    loss: LossSpec = None,
    forward: ForwardSpec = None,
    device: DeviceName = None,
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The new checkpoint; required without --dry-run.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    safety: Annotated[
        HighestSafety, typer.Option(help="The strongest kind of change that is allowed.")
    ] = HighestSafety.STATISTICS,
    level: LowestLevel = Level.WARNING,
    force: Annotated[
        bool, typer.Option("--force", help="Recompute stale statistics also where nothing can show that it helps.")
    ] = False,
    format_: Annotated[
        PageFormat, typer.Option("--format", help="Format of the receipt; html prints a page.")
    ] = PageFormat.TEXT,
) -> None:
    """Repair the batch normalization of a model and write a new checkpoint; the input is never changed.

    Statistics are recomputed only where the loss on the training data shows that it helps, and a repair is kept only if
    the metric and the loss on the data do not get worse. Exit code 0: no finding at or above --level is left, and the
    output is written. 1: findings are left; the output is written if a repair was kept. 2: the command failed.
    """
    _check_arguments(target, output, dry_run, format_)
    to_write = None if dry_run else output
    loaded, file = load_target(target, model, "to run data through it")
    if file is not None and to_write is not None:
        file.require_rewritable(to_write.suffix)
    move(loaded, device)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    from bnlab.remedies.recalibrate import UNDECIDED
    from bnlab.repairing import repair

    with prints_on_stderr():
        receipt = repair(
            loaded,
            data=load_data(data, "--data"),
            train_data=None if train_data is None else load_data(train_data, "--train-data"),
            metric=None if metric is None else load_metric(metric, "--metric"),
            lower_is_better=minimize,
            loss=None if loss is None else load_loss(loss, "--loss"),
            forward=None if forward is None else load_forward(forward, "--forward"),
            safety=safety.value,
            level=level.value,
            force=force,
            dry_run=dry_run,
        )
    changes = replace(receipt.changes, target=Target("model" if file is None else "checkpoint", target))
    _print(changes, format_)
    clean = not _findings_remain(changes, level)
    if any(left.reason.endswith(UNDECIDED) for left in changes.left_alone):
        print_notice(
            "stale statistics are not recomputed, because nothing shows that it helps. Put integer labels beside the "
            "inputs in --data and --train-data, pass --metric or --loss, or pass --force."
        )
    if to_write is not None and not ((changes.kept and changes.changes) or clean):
        print_notice(f"{to_write} is not written, because nothing was repaired")
    elif to_write is not None:
        write_output(_checkpoint_bytes(loaded, before, file, to_write), to_write)
        if changes.safety is Safety.BEHAVIOUR:
            print_notice("a state dict does not record that layers are frozen: call bnlab.freeze after loading it")
    raise typer.Exit(0 if clean else 1)


def _check_arguments(target: str, output: Path | None, dry_run: bool, format_: PageFormat) -> None:
    """Refuse arguments that cannot work, before any work is done."""
    if output is None and not dry_run:
        raise UsageError("--output: path must be given, got none. Or print the plan only: --dry-run.")
    if output is not None:
        check_output(output, [target])
    if format_ is PageFormat.HTML:
        require_pages()
    if target.lower().endswith(".onnx"):
        raise UsageError(
            f"{target}: target must be a model of torch, got an ONNX file. Repair the model it was exported from."
        )


def _print(changes: Changes, format_: PageFormat) -> None:
    if format_ is PageFormat.HTML:
        from bnlab.report.html import receipt as page

        print(page.render(changes))
    elif format_ is PageFormat.JSON:
        print(changes.dumps())
    else:
        show_receipt(changes)


def _findings_remain(changes: Changes, level: Level) -> bool:
    """Whether the model still has findings at or above a level."""
    if changes.recheck is None:
        return False
    after = changes.recheck.after
    counts = {Level.ERROR: after.errors, Level.WARNING: after.warnings, Level.INFO: after.infos}
    return any(count for finding_level, count in counts.items() if finding_level.at_least(level))


def _checkpoint_bytes(model: nn.Module, before: dict[str, Tensor], file: CheckpointFile | None, output: Path) -> bytes:
    after = model.state_dict()
    if file is None:
        from bnlab.observe.files.load import state_dict_file

        for name, tensor in after.items():
            after[name] = tensor.cpu()  # so that a machine without the device of --device can load the file
        return state_dict_file(after, output.suffix)
    changed = {
        name: value
        for name, value in after.items()
        if name not in before or not _have_equal_values(before[name], value)
    }
    return file.rewritten(changed, before.keys() - after.keys(), suffix=output.suffix)


def _have_equal_values(left: Tensor, right: Tensor) -> bool:
    import torch

    return bool(torch.equal(left, right)) or bool(((left == right) | (left.isnan() & right.isnan())).all())
