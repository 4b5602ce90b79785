"""Reads the values of a tensor that lie in another file beside the model."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.errors import DamagedFile

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["read_external"]

_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


def read_external(tensor: TensorProto, folder: Path, size: int) -> bytes:
    """Return the bytes of a tensor in an external file, as many as its dims need, whatever length the model states.

    Args:
        tensor: The tensor, which names a file and an offset in it.
        folder: The folder of the model.
        size: How many bytes the tensor needs.

    Raises:
        DamagedFile: If the path leaves the folder, if it is not that of a regular file, or if the file ends too early.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    start, stated = _number(entries.get("offset", "0")), _number(entries.get("length", str(size)))
    path = _inside(folder, location)
    if path is None or start is None or stated is None or stated < size:
        raise _unreadable(tensor, location, "no such data")
    if stated > size:
        raise _unreadable(tensor, location, f"a length of {stated} bytes for a tensor of {size} bytes")
    content = _read(path, start, size)
    if content is None or len(content) != size:
        raise _unreadable(tensor, location, "no such data")
    return content


def _inside(folder: Path, location: str) -> Path | None:
    """Return the path of an external file, or None if it does not lie in the folder of the model or below it."""
    relative = Path(location)
    if not location or "\0" in location or relative.is_absolute() or ".." in relative.parts:
        return None
    path = folder / relative
    try:
        below = path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return None
    return path if below else None


def _read(path: Path, start: int, size: int) -> bytes | None:
    """Return bytes of a regular file, or None; a link, a pipe or a device is never read."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or start + size > status.st_size:
            return None
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _number(text: str) -> int | None:
    """Return a number of bytes; None for text that is none. A file cannot be longer than 20 digits say."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(1 << 63)) else None


def _unreadable(tensor: TensorProto, location: str, got: str) -> DamagedFile:
    return DamagedFile(
        f"external data of {tensor.name!r} must be readable beside the model, got {got} in {location or '?'!r}."
    )
