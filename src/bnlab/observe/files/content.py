"""Maps the bytes of a file into memory. The system reads a page only when it is accessed."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from bnlab.errors import NotACheckpoint, UnreadableFile
from bnlab.wording import did_you_mean

__all__ = ["Content", "open_content"]


class Content(mmap.mmap):
    """A mapped file that zipfile accepts: before Python 3.13, mmap has no `seekable` method."""

    def seekable(self) -> bool:
        """Return True: a mapped file can be read in any order."""
        return True


def open_content(path: Path) -> Content:
    """Map a file for reading.

    Raises:
        UnreadableFile: If the file is missing, is a folder or device, or must not be read.
        NotACheckpoint: If the file is empty.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        hint = _names_beside(path) if isinstance(err, FileNotFoundError) else ""
        raise UnreadableFile(f"file must be readable, got: {reason.lower()}.{hint}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("file must be a regular file, got a folder, pipe or device.")
        if status.st_size == 0:
            raise NotACheckpoint("file must be a checkpoint, got an empty file.")
        content = Content(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # BN tensors lie far apart, so reading ahead would read other tensors
    return content


def _names_beside(path: Path) -> str:
    """Return a sentence with the name of a file in the same folder that is like that of a missing file; "" without one.

    Only names with the same suffix count.
    """
    try:
        names = [beside.name for beside in path.parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(path.name, (name for name in names if Path(name).suffix == path.suffix))
