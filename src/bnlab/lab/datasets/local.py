"""Where the files of a data set are looked for, and how their bytes are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.errors import DamagedFile, UnreadableFile

__all__ = ["Search", "is_file", "read_bytes", "unreadable"]

_VARIABLE = "BNLAB_DATA"


@dataclass(frozen=True)
class Search:
    """The folders in which a data set is looked for.

    Attributes:
        name: Of the data set.
        inner: Folders below the folder that is named and ``./data`` that are searched besides these themselves.
        advice: What to do where nothing is found, a sentence.
    """

    name: str
    inner: Sequence[str]
    advice: str

    def folders(self, folder: Path | None) -> list[Path]:
        """Return every folder, in the order of the search, whether it exists or not.

        Args:
            folder: Is searched first; ``$BNLAB_DATA`` if it is None.
        """
        first = folder or os.environ.get(_VARIABLE)
        tops = ([Path(first)] if first else []) + [Path("data")]
        return [top / inner for top in tops for inner in ("", *self.inner)] + [self._cache()]

    def missing_files(self, wanted: str, folder: Path | None) -> UnreadableFile:
        """Return the error that says where was looked for what, and what to do."""
        return UnreadableFile(
            f"{self.name}: {wanted} must be in a folder that is searched, got none in "
            f"{_first(folder)} and {Path('data').absolute()} "
            f"and their folders {', '.join(self.inner)}, nor in {self._cache()}. {self.advice}"
        )

    def _cache(self) -> Path:
        return Path(os.path.expanduser("~"), ".cache", "bnlab", self.name)  # noqa: PTH111 - Path.home may raise


def _first(folder: Path | None) -> str:
    """Return what an error calls the folder that is searched first."""
    if folder is not None:
        return f"{folder}"
    variable = os.environ.get(_VARIABLE)
    return f"{variable} ({_VARIABLE})" if variable else f"${_VARIABLE} (not set)"


def is_file(path: Path) -> bool:
    """Whether there is such a file; a folder that may not be entered holds none."""
    return os.path.isfile(path)  # noqa: PTH113 - that of pathlib raises where it is forbidden


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole file.

    Raises:
        UnreadableFile: If the operating system does not hand it over.
        DamagedFile: If it has more than `max_bytes` bytes.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DamagedFile(f"{path}: file must have at most {max_bytes} bytes, got {size}.")
        return path.read_bytes()
    except OSError as err:
        raise unreadable(path, err) from None


def unreadable(path: Path, err: OSError) -> UnreadableFile:
    """Return the error that stands for one of the operating system."""
    return UnreadableFile(f"{path}: file must be readable, got: {(err.strerror or str(err)).lower()}.")
