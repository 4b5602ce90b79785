"""`bnlab pool` pools the BN statistics of several checkpoints of one network, and writes a new file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnlab.cli.output import check_output, print_notice, write_output
from bnlab.errors import UsageError
from bnlab.wording import counted

if TYPE_CHECKING:
    from bnlab.observe.files.checkpoint import StoredFile
    from bnlab.pooling import Pooled

__all__ = ["command"]

_SAFETENSORS = ".safetensors"
_FEWEST = 2
_WEIGHTED = {
    "counts": "weighted by --weights",
    "num_batches_tracked": "weighted by num_batches_tracked",
    "equal": "weighted equally",
}


class OtherTensors(str, Enum):
    """Where the tensors that are no BN statistics come from."""

    AVERAGE = "average"
    FIRST = "first"


def command(
    paths: Annotated[
        list[str], typer.Argument(metavar="A B...", help="Checkpoints of one network: ranks, clients or models.")
    ],
    output: Annotated[Path, typer.Option(metavar="PATH", help="The new checkpoint, in the nesting of A.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W...", help="One weight per file, such as 3,1; num_batches_tracked without it."),
    ] = None,
    rest: Annotated[
        OtherTensors, typer.Option(help="Average the other floating tensors, or take those of A.")
    ] = OtherTensors.AVERAGE,
) -> None:
    """Pool the batch normalization statistics of checkpoints and write a new one; the inputs are never changed.

    Means and variances are pooled by the law of total variance, and counters are summed. Exit code 0: the output is
    written. 2: no file is written.
    """
    if len(paths) < _FEWEST:
        raise UsageError(f"pool: paths must be those of at least two checkpoints, got {paths[0]} alone.")
    counts = None if weights is None else _counts(weights, len(paths))
    check_output(output, paths)
    from bnlab.observe.files.checkpoint import read_stored
    from bnlab.pooling import pooled_states

    first = read_stored(Path(paths[0]))
    content = _content(Path(paths[0]), first, output.suffix)
    pooled = pooled_states(_Files(paths, content), counts, rest=rest.value, labels=paths)
    write_output(_bytes(pooled, first, output, is_nested=content is not first.tree), output)
    for note in pooled.notes:
        print_notice(f"warning: pool: {note}")
    layers = counted(len(pooled.leaves.layers), "BN layer")
    print(f"pool: {layers} of {len(paths)} files, {_WEIGHTED[pooled.weights]}; wrote {output}")


def _counts(text: str, files: int) -> list[float]:
    """Return the weights of the option --weights."""
    parts = [part.strip() for part in text.split(",")]
    try:
        counts = [float(part) for part in parts]
    except ValueError:
        counts = []
    if not counts or not all(0 < count < math.inf for count in counts):
        raise UsageError(f"--weights: value must be finite numbers above 0 with commas between them, got {text}.")
    if len(counts) != files:
        raise UsageError(f"--weights: value must have one number per file, got {len(counts)} for {files} files.")
    return counts


class _Files(Sequence[object]):
    """The contents of files. Each is opened when it is indexed, and its tensors are read when they are pooled."""

    def __init__(self, paths: Sequence[str], first: object) -> None:
        self._paths = paths
        self._first = first

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        from bnlab.observe.files.checkpoint import read_stored

        return self._first if index == 0 else read_stored(Path(self._paths[index])).tree


def _content(path: Path, stored: StoredFile, suffix: str) -> object:
    """Return the contents of the first file: with all that torch.save wrote, if the new file can hold that."""
    from bnlab.observe.files.checkpoint import FileFormat
    from bnlab.observe.files.load import plain_content

    if suffix == _SAFETENSORS or stored.format not in (FileFormat.ZIP, FileFormat.LEGACY):
        return stored.tree
    return plain_content(path, lambda content: content)


def _bytes(pooled: Pooled, first: StoredFile, output: Path, *, is_nested: bool) -> bytes:
    import io

    import torch

    from bnlab.observe.files.checkpoint import FileFormat
    from bnlab.observe.files.load import state_dict_file

    if not is_nested:
        return state_dict_file(_flat(pooled, output), output.suffix, first.metadata)
    buffer = io.BytesIO()
    torch.save(pooled.state, buffer, _use_new_zipfile_serialization=first.format is not FileFormat.LEGACY)
    return buffer.getvalue()


def _flat(pooled: Pooled, output: Path) -> dict[str, Any]:
    """Return the one state dict of the file, by the names of its tensors.

    Raises:
        UsageError: If the file holds several networks.
    """
    starts = {pooled.leaves.paths[layer.mean][:-1] for layer in pooled.leaves.layers}
    if len(starts) != 1:
        raise UsageError(
            f"--output: path must be that of a .pt file where BN layers lie in {len(starts)} containers, got {output}. "
            "Write --output PATH.pt, from files of torch.save."
        )
    (start,) = starts
    flat = {}
    for path in pooled.leaves.paths.values():
        if path[:-1] == start:
            value = pooled.state
            for key in path:
                value = value[key]
            flat[str(path[-1])] = value
    return flat
