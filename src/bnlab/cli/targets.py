"""Resolves TARGET arguments: files, folders, globs, and callables that build a model."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.cli.importing import is_spec
from bnlab.cli.specs import TARGET, load_model
from bnlab.cli.target_files import ANY_DEPTH, Walk, is_folder, matching
from bnlab.errors import BnlabError, NotACheckpoint, UnreadableFile, UsageError

if TYPE_CHECKING:
    from torch import nn

    from bnlab.observe.files.load import CheckpointFile

__all__ = ["Targets", "expand", "is_model_spec", "load_target"]


@dataclass(frozen=True)
class Targets:
    """The targets to check.

    Attributes:
        items: Files and model specs, each once, in order; an error in place of an argument that matches nothing.
        parts: The files that are parts of an item: those of an index, or of a network over numbered files.
        many: Whether to write one line per target. This is so if there are several targets, or an argument is a folder
            or glob, unless the only item is an error.
    """

    items: tuple[str | BnlabError, ...]
    many: bool
    parts: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The files and model specs, without the errors, and with the parts of networks over several files."""
        return [*(item for item in self.items if isinstance(item, str)), *self.parts]


def is_model_spec(target: str) -> bool:
    """Whether a target is `package.module:callable` or `file.py:callable` rather than a path."""
    return is_spec(target) and not os.path.exists(target)  # noqa: PTH110 - see expand


def expand(arguments: Sequence[str]) -> Targets:
    """Return the files and model specs that the arguments stand for.

    A folder stands for the checkpoints below it, which are recognised by their suffix, or by their first bytes if they
    have no suffix. The folder of a distributed checkpoint stands for itself, and the files of one network for one item:
    their index, or their name with ``*`` in place of the number. This uses os.path because pathlib raises if a path is
    too long or forbidden.
    """
    from bnlab.cli.networks import is_network_folder, joined_networks

    items: list[str | BnlabError] = []
    several = len(arguments) > 1
    for argument in arguments:
        if _is_python_file(argument):
            items.append(_missing_callable(argument))
        elif is_network_folder(argument):
            items.append(argument)
        elif os.path.isdir(argument):  # noqa: PTH112
            items += _in_folder(argument, Walk(follows_links=False))
            several = True
        elif glob.has_magic(argument) and not is_model_spec(argument) and not os.path.exists(argument):  # noqa: PTH110
            items += _matching(argument)
            several = True
        else:
            items.append(argument or UsageError("TARGET: path must not be empty."))
    unique = {os.path.normpath(item) if isinstance(item, str) else id(item): item for item in reversed(items)}
    items = list(reversed(unique.values()))
    items, parts = joined_networks(items, arguments) if several else (items, [])
    only_an_error = len(items) == 1 and isinstance(items[0], BnlabError)
    return Targets(tuple(items), several and not only_an_error, tuple(parts))


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


def _matching(pattern: str) -> list[str | BnlabError]:
    from bnlab.cli.networks import is_network_folder

    paths, errors = matching(pattern)
    if not paths and not errors:
        return [UnreadableFile(f"{pattern}: pattern must match at least one file, got none.")]
    items: list[str | BnlabError] = list(errors)
    walk = Walk(follows_links=False)
    for path in paths:
        if not os.path.isdir(path) or is_network_folder(path):  # noqa: PTH112
            items.append(path)
        elif ANY_DEPTH not in pattern:
            items += _in_folder(path, walk)
    return items


def _in_folder(folder: str, walk: Walk) -> list[str | BnlabError]:
    """Return the checkpoints below a folder, or one error if it has none.

    Args:
        folder: The folder.
        walk: The walk through this and other folders, which does not enter a folder twice.
    """
    from bnlab.cli.networks import is_network_folder
    from bnlab.observe.files.distributed_checkpoint import CHUNK_SUFFIX, METADATA
    from bnlab.observe.files.refused_formats import refused_folder

    errors, is_new = len(walk.errors), False
    checkpoints: list[str] = []
    for path, entries in walk.folders(folder):
        is_new = True
        checkpoints += [str(Path(path, entry.name)) for entry in entries if _is_checkpoint(entry)]
        foreign = refused_folder(frozenset(entry.name for entry in entries))
        if foreign is not None:
            walk.errors.append(NotACheckpoint(f"{path}: folder must hold checkpoints, got {foreign}."))
        if is_network_folder(path):
            checkpoints.append(str(Path(path)))
        elif any(entry.name.endswith(CHUNK_SUFFIX) for entry in entries):
            walk.errors.append(
                UnreadableFile(
                    f"{path}: folder of a distributed checkpoint must hold {METADATA}, got only {CHUNK_SUFFIX} files. "
                    "Copy it from where it was saved: the last rank to finish writes it."
                )
            )
    items: list[str | BnlabError] = [*walk.errors[errors:], *sorted(checkpoints)]
    if not items and is_new:
        return [UnreadableFile(f"{folder}: folder must hold at least one checkpoint, got none.")]
    return items


def _is_checkpoint(entry: os.DirEntry[str]) -> bool:
    """Return whether a file is a checkpoint: by its suffix, or by its first bytes if it has none."""
    from bnlab.observe.files.checkpoint import CHECKPOINT_SUFFIXES, looks_like_checkpoint
    from bnlab.observe.files.distributed_checkpoint import METADATA
    from bnlab.observe.files.sharded_index import is_index

    if is_folder(entry, follow=True) or entry.name == METADATA:
        return False
    suffix = Path(entry.name).suffix.lower()
    is_known = suffix in CHECKPOINT_SUFFIXES or is_index(entry.name)
    return is_known or (not suffix and looks_like_checkpoint(Path(entry.path)))
