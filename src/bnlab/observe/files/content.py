"""The bytes of a file, mapped into memory: a page is read only when it is touched."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from bnlab.errors import NotACheckpoint, UnreadableFile

__all__ = ["Content", "open_content"]


class Content(mmap.mmap):
    """A mapped file that zipfile accepts: before Python 3.13 a map does not say that it is seekable."""

    def seekable(self) -> bool:
        """A map can always be read in any order."""
        return True


def open_content(path: Path) -> Content:
    """Map a file for reading.

    Raises:
        UnreadableFile: If it is missing, a folder, a device, or not permitted.
        NotACheckpoint: If it is empty.
    """
    try:
        # O_NONBLOCK: opening a pipe nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise UnreadableFile(f"file must be readable, got: {reason.lower()}.") from None
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
        content.madvise(mmap.MADV_RANDOM)  # BN tensors lie far apart: reading ahead would bring in their neighbours
    return content
