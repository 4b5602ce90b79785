"""`bnlab fold` folds BN into the layers around it: an ONNX file becomes an ONNX file, a model a .pt2 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli.device import move
from bnlab.cli.options import DeviceName, ExampleSpec, ForwardSpec, ModelSpec
from bnlab.cli.output import Format, check_output, prints_on_stderr, show_receipt, write_output
from bnlab.cli.specs import load_example, load_forward
from bnlab.cli.targets import load_target
from bnlab.errors import UsageError

if TYPE_CHECKING:
    from bnlab.records import Changes

__all__ = ["command"]

_ONNX = ".onnx"
_EXPORTED = ".pt2"


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="An ONNX file, a checkpoint, or package.module:callable or file.py:callable that builds a model.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="PATH", help="File of the folded model: .onnx for ONNX, else .pt2.")],
    model: ModelSpec = None,
    example: ExampleSpec = None,
    forward: ForwardSpec = None,
    device: DeviceName = None,
    format_: Annotated[Format, typer.Option("--format", help="Format of the receipt.")] = Format.TEXT,
) -> None:
    """Fold batch normalization into the layers around it and write a new file; the input is never changed.

    bnlab runs the folded model beside the original and writes no file if their outputs differ. torch.export writes a
    model, because a folded state dict does not fit the old class. The file runs on the device of --device, and takes
    the arguments with which --forward calls the model. Exit code 0: every BN is folded, or an ONNX file has none.
    1: some BN is left, with its reason in the receipt; the file is written. 2: no file is written.
    """
    check_output(output, [target])
    is_onnx = target.lower().endswith(_ONNX)
    wanted = _ONNX if is_onnx else _EXPORTED
    if output.suffix != wanted:
        raise UsageError(f"--output: path must end in {wanted} for {target}, got {output}.")
    specs = _Specs(model, example, forward, device)
    content, changes, notes = _onnx(target, specs) if is_onnx else _torch(target, specs)
    write_output(content, output)
    if format_ is Format.JSON:
        print(changes.dumps())
    else:
        show_receipt(changes, notes)
    if _left(changes):
        raise typer.Exit(1)


def _left(changes: Changes) -> set[str]:
    """Return the BN layers that are still there. One that became a scale and a shift is not."""
    return {layer.layer for layer in changes.left_alone} - {change.layer for change in changes.changes}


@dataclass(frozen=True)
class _Specs:
    """The options of the command line that concern a model."""

    model: str | None
    example: str | None
    forward: str | None
    device: str | None


def _onnx(target: str, specs: _Specs) -> tuple[bytes, Changes, list[str]]:
    for option in ("model", "forward", "device"):
        value = getattr(specs, option)
        if value is not None:
            raise UsageError(f"--{option}: value must not be given with an ONNX file, got {value}.")
    from bnlab.observe.passes.example import example_of
    from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx

    example = None if specs.example is None else _arrays(example_of(load_example(specs.example), "--example"))
    folded = fold_onnx(Path(target), example=example)
    return folded.content, folded.changes, []


def _arrays(batch: Any) -> Any:
    """Return a batch for an ONNX model: an array, or a dict of arrays by input name."""
    from collections.abc import Mapping

    from torch import Tensor

    from bnlab.observe.passes.batches import input_of_batch

    batch = input_of_batch(batch)
    if isinstance(batch, Mapping):
        return {name: _arrays(value) for name, value in batch.items()}
    return batch.numpy() if isinstance(batch, Tensor) else batch


def _torch(target: str, specs: _Specs) -> tuple[bytes, Changes, list[str]]:
    if specs.example is None:
        raise UsageError(f"--example: value must be given to see what {target} executes, got none.")
    loaded, _ = load_target(target, specs.model, "to see what it executes")
    move(loaded, specs.device)
    from bnlab.observe.passes.calling import require_forward
    from bnlab.observe.passes.example import example_of
    from bnlab.observe.passes.placement import batches_of
    from bnlab.remedies.fold.export import exported
    from bnlab.remedies.fold.fold import fold

    forward = require_forward("fold", None if specs.forward is None else load_forward(specs.forward))
    (batch,) = batches_of([example_of(load_example(specs.example), "--example")], loaded)
    with prints_on_stderr():
        receipt = fold(loaded, batch, forward=forward)
        content, note = exported(receipt.model, batch, forward)
    return content, receipt.changes, [f"  written by torch.export: {note}"]
