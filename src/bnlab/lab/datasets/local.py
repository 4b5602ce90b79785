"""The search for the files of a data set, and opening them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bnlab.errors import UnreadableFile
from bnlab.regular_file import open_regular
from bnlab.wording import reason_of

__all__ = ["Search", "is_file", "open_file", "unreadable"]

_VARIABLE = "BNLAB_DATA"


@dataclass(frozen=True)
class Search:
    """The folders that are searched for a data set.

    Attributes:
        name: The name of the data set.
        inner: Folders below the first folder and ``./data`` that are searched in addition to these two.
        advice: What to do if the files are missing, a sentence.
    """

    name: str
    inner: Sequence[str]
    advice: str

    def folders(self, folder: Path | None) -> list[Path]:
        """Return every folder in the order of the search, whether it exists or not.

        Args:
            folder: The first folder; None stands for ``$BNLAB_DATA``.
        """
        first = folder or os.environ.get(_VARIABLE)
        tops = ([Path(first)] if first else []) + [Path("data")]
        return [top / inner for top in tops for inner in ("", *self.inner)] + [self._cache()]

    def missing_files(self, wanted: str, folder: Path | None) -> UnreadableFile:
        """Return the error that lists the missing files, the folders that were searched, and the advice."""
        return UnreadableFile(
            f"{self.name}: {wanted} must be in a folder that is searched, got none in "
            f"{_first(folder)} and {Path('data').absolute()} "
            f"and their folders {', '.join(self.inner)}, nor in {self._cache()}. {self.advice}"
        )

    def _cache(self) -> Path:
        return Path(os.path.expanduser("~"), ".cache", "bnlab", self.name)  # noqa: PTH111 - Path.home may raise


def _first(folder: Path | None) -> str:
    """Return the name of the first folder in an error."""
    if folder is not None:
        return f"{folder}"
    variable = os.environ.get(_VARIABLE)
    return f"{variable} ({_VARIABLE})" if variable else f"${_VARIABLE} (not set)"


def is_file(path: Path) -> bool:
    """Whether there is such a file. A folder without permission counts as empty."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises a PermissionError


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        UnreadableFile: If the operating system cannot open it, or it is no regular file.
    """
    try:
        return open(open_regular(path), "rb")  # noqa: PTH123 - a descriptor has no path
    except UnreadableFile as err:
        raise UnreadableFile(f"{path}: {err}") from None


def unreadable(path: Path, err: OSError) -> UnreadableFile:
    """Return the error of bnlab for an error of the operating system."""
    return UnreadableFile(f"{path}: file must be readable, got: {reason_of(err)}.")
