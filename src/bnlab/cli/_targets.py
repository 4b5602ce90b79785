"""What the TARGET arguments stand for: files, folders, globs, and `package.module:callable`."""

from __future__ import annotations

import glob
import importlib
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.errors import UnreadableFile, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model", "expand", "is_model_spec"]

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_model_spec(target: str) -> bool:
    """Whether a target is `package.module:callable` rather than a path."""
    return _SPEC.fullmatch(target) is not None and not Path(target).exists()


def expand(targets: Sequence[str]) -> list[str]:
    """Return the files and model specs that the targets stand for, each once, in order.

    A folder stands for the checkpoints below it, told by suffix, or by their first bytes if they have no suffix.

    Raises:
        UnreadableFile: If a folder or glob holds no checkpoint.
    """
    expanded: list[str] = []
    for target in targets:
        if Path(target).is_dir():
            expanded += _some(_in_folder(Path(target)), target, "folder")
        elif glob.has_magic(target) and not Path(target).exists():
            found = sorted(glob.glob(target, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            expanded += _some([path for path in found if not Path(path).is_dir()], target, "pattern")
        else:
            expanded.append(target)
    return list(dict.fromkeys(expanded))


def build_model(spec: str) -> nn.Module:
    """Import `package.module:callable`, from the current folder first, and call it.

    Raises:
        UsageError: If there is no such callable, it raises, or it returns something else than a module.
    """
    module_name, _, attribute = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        model: object = operator.attrgetter(attribute)(importlib.import_module(module_name))()
    except Exception as err:
        text = " ".join(f"{type(err).__name__}: {err}".split())
        raise UsageError(f"{spec}: target must be a callable that returns a model, got {text}.") from err
    finally:
        sys.path.pop(0)

    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec}: target must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _some(found: list[str], target: str, kind: str) -> list[str]:
    if not found:
        raise UnreadableFile(f"{target}: {kind} must hold at least one checkpoint, got none.")
    return found


def _in_folder(folder: Path) -> list[str]:
    from bnlab.observe.checkpoint import CHECKPOINT_SUFFIXES, looks_like_checkpoint

    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(
        str(path)
        for path in paths
        if path.suffix.lower() in CHECKPOINT_SUFFIXES or (not path.suffix and looks_like_checkpoint(path))
    )
