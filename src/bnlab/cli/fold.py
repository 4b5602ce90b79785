"""`bnlab fold` folds BN into the layers around it: an ONNX file becomes an ONNX file, a model a .pt2 file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli.options import ExampleSpec, ModelSpec
from bnlab.cli.output import Format, check_output, show_receipt, write_output
from bnlab.cli.specs import load_example
from bnlab.cli.targets import load_target
from bnlab.errors import UsageError

if TYPE_CHECKING:
    from bnlab.records import Changes

__all__ = ["command"]

_ONNX = ".onnx"
_EXPORTED = ".pt2"


def command(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="An ONNX file, a checkpoint, or package.module:callable.")
    ],
    output: Annotated[Path, typer.Option(metavar="PATH", help="File of the folded model: .onnx for ONNX, else .pt2.")],
    model: ModelSpec = None,
    example: ExampleSpec = None,
    format_: Annotated[Format, typer.Option("--format", help="Format of the receipt.")] = Format.TEXT,
) -> None:
    """Fold batch normalization into the layers around it and write a new file; the input is never changed.

    bnlab runs the folded model beside the original and writes no file if their outputs differ. torch.export writes a
    model, because a folded state dict does not fit the old class. Exit code 0: the file is written. 2: it is not.
    """
    check_output(output, [target])
    is_onnx = target.lower().endswith(_ONNX)
    wanted = _ONNX if is_onnx else _EXPORTED
    if output.suffix != wanted:
        raise UsageError(f"--output: path must end in {wanted} for {target}, got {output}.")
    content, changes, notes = _onnx(target, model, example) if is_onnx else _torch(target, model, example)
    write_output(content, output)
    if format_ is Format.JSON:
        print(changes.dumps())
    else:
        show_receipt(changes, notes)


def _onnx(target: str, model: str | None, example: str | None) -> tuple[bytes, Changes, list[str]]:
    if model is not None:
        raise UsageError(f"--model: value must not be given with an ONNX file, got {model}.")
    from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx

    folded = fold_onnx(Path(target), example=None if example is None else _arrays(load_example(example)))
    return folded.content, folded.changes, []


def _arrays(batch: Any) -> Any:
    """Return a batch for an ONNX model: an array, or a dict of arrays by input name."""
    from collections.abc import Mapping

    from torch import Tensor

    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {name: _arrays(value) for name, value in batch.items()}
    return batch.numpy() if isinstance(batch, Tensor) else batch


def _torch(target: str, model: str | None, example: str | None) -> tuple[bytes, Changes, list[str]]:
    if example is None:
        raise UsageError(f"--example: value must be given to see what {target} executes, got none.")
    loaded, _ = load_target(target, model, "to see what it executes")
    from bnlab.remedies.fold.export import exported
    from bnlab.remedies.fold.fold import fold

    batch = load_example(example)
    receipt = fold(loaded, batch)
    content, note = exported(receipt.model, batch)
    return content, receipt.changes, [f"  written by torch.export: {note}"]
