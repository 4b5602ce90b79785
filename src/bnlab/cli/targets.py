"""Resolves TARGET arguments: files, folders, globs, and callables that build a model."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.cli.importing import is_spec
from bnlab.cli.specs import TARGET, load_model
from bnlab.errors import BnlabError, UnreadableFile, UsageError

if TYPE_CHECKING:
    from torch import nn

    from bnlab.observe.files.load import CheckpointFile

__all__ = ["Targets", "expand", "is_model_spec", "load_target"]


@dataclass(frozen=True)
class Targets:
    """The targets to check.

    Attributes:
        items: Files and model specs, each once, in order; an error in place of an argument that matches nothing.
        many: Whether to write one line per target. This is so if there are several targets, or an argument is a folder
            or glob, unless the only item is an error.
    """

    items: tuple[str | BnlabError, ...]
    many: bool

    @property
    def names(self) -> list[str]:
        """The files and model specs, without the errors."""
        return [item for item in self.items if isinstance(item, str)]


def is_model_spec(target: str) -> bool:
    """Whether a target is `package.module:callable` or `file.py:callable` rather than a path."""
    return is_spec(target) and not os.path.exists(target)  # noqa: PTH110 - see expand


def expand(arguments: Sequence[str]) -> Targets:
    """Return the files and model specs that the arguments stand for.

    A folder stands for the checkpoints below it, which are recognised by their suffix, or by their first bytes if they
    have no suffix. This uses os.path because pathlib raises if a path is too long or forbidden.
    """
    items: list[str | BnlabError] = []
    several = len(arguments) > 1
    for argument in arguments:
        if _is_python_file(argument):
            items.append(_missing_callable(argument))
        elif os.path.isdir(argument):  # noqa: PTH112
            items += _in_folder(argument)
            several = True
        elif glob.has_magic(argument) and not is_model_spec(argument) and not os.path.exists(argument):  # noqa: PTH110
            items += _matching(argument)
            several = True
        else:
            items.append(argument or UsageError("TARGET: path must not be empty."))
    unique = {os.path.normpath(item) if isinstance(item, str) else id(item): item for item in reversed(items)}
    only_an_error = len(unique) == 1 and isinstance(items[0], BnlabError)
    return Targets(tuple(reversed(unique.values())), several and not only_an_error)


def load_target(target: str, spec: str | None, purpose: str) -> tuple[nn.Module, CheckpointFile | None]:
    """Return the model of a target and, if the target is a checkpoint, its file.

    Args:
        target: A checkpoint, or a callable that builds a model.
        spec: The callable that builds the model of a checkpoint.
        purpose: Why the model is needed, such as "to run data through it".

    Raises:
        UsageError: If a checkpoint has no `spec`, or the model cannot be built or loaded.
    """
    if is_model_spec(target):
        return load_model(target, TARGET), None
    if _is_python_file(target):
        raise _missing_callable(target)
    if spec is None:
        raise UsageError(f"--model: value must be given with {target}, {purpose}, got none.")
    from bnlab.observe.files.load import load_into

    model = load_model(spec)
    return model, load_into(model, Path(target))


def _is_python_file(target: str) -> bool:
    return target.endswith(".py") and not os.path.isdir(target)  # noqa: PTH112


def _missing_callable(target: str) -> UsageError:
    return UsageError(
        f"{target}: target must be a checkpoint, or a callable that returns a model, got a Python file. Name the "
        f"callable in it, as in {target}:build."
    )


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
