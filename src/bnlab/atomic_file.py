"""Writes files completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bnlab.errors import UnwritableFile

__all__ = ["write_whole"]

_LONGEST_NAME = 50


def write_whole(data: bytes, path: Path, *, option: str | None = None) -> None:
    """Write a file through a temporary file beside it, so that nobody sees a partial file.

    A pipe or device is written to directly. A symbolic link stays a link.

    Args:
        data: The content of the file.
        path: The path of the file; an existing file is replaced.
        option: The command-line option that names the path, if any; an error begins with it.

    Raises:
        UnwritableFile: If the file cannot be written. An existing file is then unchanged.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if option is None:
            raise UnwritableFile(f"{path}: file must be writable, got: {reason}.") from None
        raise UnwritableFile(f"{option}: path must be writable, got {path}: {reason}.") from None


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:_LONGEST_NAME]}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).chmod(0o666 & ~_umask())  # temporary files are private by default
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
