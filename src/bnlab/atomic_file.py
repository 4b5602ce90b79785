"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bnlab.errors import UnwritableFile

__all__ = ["write_whole"]

_LONGEST_NAME = 50


def write_whole(data: bytes, path: Path, *, option: str | None = None) -> None:
    """Write a file by way of a temporary one beside it, so that it is never there in part.

    A pipe or device is written to as it is; a symbolic link stays one.

    Args:
        data: What the file is to hold.
        path: Where; a file that is there is replaced.
        option: Of the command line that names the path; an error begins with it.

    Raises:
        UnwritableFile: If it cannot be written; what was there before is still there.
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
            Path(file.name).chmod(0o666 & ~_umask())  # a temporary file is born private
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
