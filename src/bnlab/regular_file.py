"""Opens files for reading: regular files only, so that no name can make bnlab wait for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bnlab.errors import DamagedFile, UnreadableFile
from bnlab.wording import did_you_mean, reason_of

__all__ = ["open_regular", "read_whole"]

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
"""O_NONBLOCK: opening a pipe without a writer, or reading a file of the kernel without news, would wait for ever."""

_BLOCK = 1 << 20


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    A folder, pipe, socket or device is refused at once, and is not even opened, because opening a device may already
    act on it. A symbolic link is followed.

    Raises:
        UnreadableFile: If the file is missing, is not a regular file, lies behind symbolic links that form a circle,
            or must not be read. The message does not name the file.
    """
    try:
        _require_regular(os.stat(path).st_mode)  # noqa: PTH116 - takes the same names as os.open
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as err:  # ValueError: a null byte in the name
        hint = _names_beside(path) if isinstance(err, FileNotFoundError) else ""
        raise UnreadableFile(f"file must be readable, got: {reason_of(err)}.{hint}") from None
    try:
        _require_regular(os.fstat(descriptor).st_mode)  # the name may stand for another file by now
    except UnreadableFile:
        os.close(descriptor)
        raise
    return descriptor


def read_whole(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The path of the file; every message begins with it.
        max_bytes: The largest size that is read. A file that grows while it is read cannot exceed it either.

    Raises:
        UnreadableFile: As `open_regular` does.
        DamagedFile: If the file has more than `max_bytes` bytes.
    """
    try:
        descriptor = open_regular(path)
    except UnreadableFile as err:
        raise UnreadableFile(f"{path}: {err}") from None
    try:
        size = os.fstat(descriptor).st_size
        content = _read(descriptor, max_bytes + 1) if size <= max_bytes else b""
    except OSError as err:
        raise UnreadableFile(f"{path}: file must be readable, got: {reason_of(err)}.") from None
    finally:
        os.close(descriptor)
    size = max(size, len(content))
    if size > max_bytes:
        raise DamagedFile(f"{path}: file must have at most {max_bytes} bytes, got {size}.")
    return content


def _read(descriptor: int, max_bytes: int) -> bytes:
    """Read to the end of a file, or `max_bytes` of it. Files of the kernel do not state their size."""
    blocks, left = [], max_bytes
    while left > 0 and (block := os.read(descriptor, min(left, _BLOCK))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UnreadableFile("file must be a regular file, got a folder, pipe or device.")


def _names_beside(path: Path) -> str:
    """Return a sentence with the name of a file in the same folder that is like that of a missing file; "" without one.

    Only names with the same suffix count.
    """
    try:
        names = [beside.name for beside in path.parent.iterdir()]
    except OSError:
        return ""
    others = (name for name in names if Path(name).suffix == path.suffix and name != path.name)
    return did_you_mean(path.name, others)
