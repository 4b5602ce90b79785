"""Resolves the names by which one file of a network refers to the others."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from bnlab.errors import DamagedFile

__all__ = ["file_beside"]


def file_beside(path: Path, name: object) -> Path:
    """Return the path of a file that another file names, which must lie in the folder of the latter.

    A download must not choose which files of the user are read. A link may lead out of the folder only to where the
    naming file itself lies, because the cache of Hugging Face keeps all files of a model in one other folder.

    Args:
        path: The file that names the other.
        name: The name, relative to the folder of `path`.

    Raises:
        DamagedFile: If the name is that of a file elsewhere.
    """
    if not isinstance(name, str) or not _stays_below(name):
        raise DamagedFile(f"file must name files in its own folder, got {name!r}. Download it again from its source.")
    beside = path.parent / name
    target = os.path.realpath(beside)
    roots = (os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path)))  # noqa: PTH120 - as realpath
    if not any(PurePath(target).is_relative_to(root) for root in roots):
        raise DamagedFile(
            f"file must name files in its own folder, got {name!r}, a link to {target}. Copy that file into the folder."
        )
    return beside


def _stays_below(name: str) -> bool:
    parts = PurePath(name).parts
    return bool(parts) and "\0" not in name and ".." not in parts and not PurePath(name).anchor
