"""What the TARGET arguments stand for: files, folders, globs, and `package.module:callable`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.cli.specs import TARGET, is_spec, load_model
from bnlab.errors import BnlabError, UnreadableFile, UsageError

if TYPE_CHECKING:
    from torch import nn

    from bnlab.observe.files.load import CheckpointFile

__all__ = ["Targets", "expand", "is_model_spec", "load_target"]


@dataclass(frozen=True)
class Targets:
    """What there is to check.

    Attributes:
        items: Files and model specs, each once, in order; an error where an argument stands for nothing.
        many: Whether to write a line per target: there are several, or a folder or glob might hold several, and it is
            not one error alone.
    """

    items: tuple[str | BnlabError, ...]
    many: bool

    @property
    def names(self) -> list[str]:
        """The files and model specs without the errors."""
        return [item for item in self.items if isinstance(item, str)]


def is_model_spec(target: str) -> bool:
    """Whether a target is `package.module:callable` rather than a path."""
    return is_spec(target) and not os.path.exists(target)  # noqa: PTH110 - see expand


def expand(arguments: Sequence[str]) -> Targets:
    """Return the files and model specs that the arguments stand for.

    A folder stands for the checkpoints below it, told by suffix, or by their first bytes if they have no suffix. The
    functions of os.path are used because those of pathlib raise where a path is too long or forbidden.
    """
    items: list[str | BnlabError] = []
    several = len(arguments) > 1
    for argument in arguments:
        if os.path.isdir(argument):  # noqa: PTH112
            items += _in_folder(argument)
            several = True
        elif glob.has_magic(argument) and not os.path.exists(argument):  # noqa: PTH110
            items += _matching(argument)
            several = True
        else:
            items.append(argument or UsageError("TARGET: path must not be empty."))
    unique = {os.path.normpath(item) if isinstance(item, str) else id(item): item for item in reversed(items)}
    only_an_error = len(unique) == 1 and isinstance(items[0], BnlabError)
    return Targets(tuple(reversed(unique.values())), several and not only_an_error)


def load_target(target: str, spec: str | None, purpose: str) -> tuple[nn.Module, CheckpointFile | None]:
    """Return the model that one target stands for, and the file it was loaded from if it is a checkpoint.

    Args:
        target: A checkpoint, or `package.module:callable`.
        spec: What builds the model of a checkpoint.
        purpose: What the model is needed for, as "to run data through it".

    Raises:
        UsageError: If a checkpoint comes without a model, or either cannot be built or loaded.
    """
    if is_model_spec(target):
        return load_model(target, TARGET), None
    if spec is None:
        raise UsageError(f"--model: value must be given with {target}, {purpose}, got none.")
    from bnlab.observe.files.load import load_into

    model = load_model(spec)
    return model, load_into(model, Path(target))


def _matching(pattern: str) -> Iterator[str | BnlabError]:
    paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not paths:
        yield UnreadableFile(f"{pattern}: pattern must match at least one file, got none.")
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112
            yield path
        elif "**" not in pattern:
            yield from _in_folder(path)


def _in_folder(folder: str) -> Iterator[str | BnlabError]:
    from bnlab.observe.files.checkpoint import CHECKPOINT_SUFFIXES, looks_like_checkpoint

    unreadable: list[OSError] = []
    paths = [Path(root, name) for root, _, names in os.walk(folder, onerror=unreadable.append) for name in names]
    checkpoints = sorted(
        str(path)
        for path in paths
        if path.suffix.lower() in CHECKPOINT_SUFFIXES or (not path.suffix and looks_like_checkpoint(path))
    )
    for err in unreadable:
        yield UnreadableFile(f"{err.filename}: folder must be readable, got: {(err.strerror or str(err)).lower()}.")
    if not checkpoints and not unreadable:
        yield UnreadableFile(f"{folder}: folder must hold at least one checkpoint, got none.")
    yield from checkpoints
