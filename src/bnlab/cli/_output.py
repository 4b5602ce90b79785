"""Where results go: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bnlab.errors import UnreadableFile, UsageError

__all__ = ["emit", "refuse_input", "write_whole"]


def refuse_input(output: Path, inputs: Iterable[str]) -> None:
    """Refuse an output path that is one of the inputs.

    Raises:
        UsageError: If it is.
    """
    for path in map(Path, inputs):
        if path.exists() and output.exists() and path.samefile(output):
            raise UsageError(f"--output: path must not be an input, got {output}.")


def emit(text: str, output: Path | None) -> None:
    """Write text to a file, or to stdout where there is none."""
    if output is None:
        sys.stdout.write(text)
    else:
        write_whole(text.encode(), output)


def write_whole(data: bytes, output: Path) -> None:
    """Write a file by way of a temporary one beside it, so that it is never there in part.

    Raises:
        UnreadableFile: If it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                Path(file.name).chmod(0o666 & ~_umask())  # a temporary file is born private
                Path(file.name).replace(output)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as err:
        reason = (err.strerror or str(err)).lower()
        raise UnreadableFile(f"--output: path must be writable, got {output}: {reason}.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
