"""Temporary files that outlive no process: their names say who writes them, and a lock says that somebody still does.

The name of a temporary file carries the machine, the number and the start of the process that writes it. A process
removes a temporary file of another one only if that process is gone and nobody holds the lock of the file. So it never
touches a file that is being written, also if the folder is shared between containers or machines.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":  # which has no such locks: there, nothing stale is removed
    import fcntl

__all__ = ["partial_path", "remove_stale", "remove_unfinished", "writing"]

_LONGEST_NAME = 30
_SUFFIX = ".bnlab-partial"
_unfinished: set[Path] = set()
_NAME = re.compile(rf"\..*\.(?P<machine>[0-9a-f]{{8}})-(?P<process>\d+)-(?P<start>\d+)-[0-9a-f]+{re.escape(_SUFFIX)}")


def partial_path(target: Path) -> Path:
    """Return a path for the temporary file of a target, beside it, that no other writer uses."""
    process = os.getpid()
    owner = f"{_machine()}-{process}-{_start_of(process) or 0}-{os.urandom(8).hex()}"
    return target.with_name(f".{target.name[:_LONGEST_NAME]}.{owner}{_SUFFIX}")


@contextlib.contextmanager
def writing(path: Path, mode: int) -> Iterator[BinaryIO]:
    """Create a file and open it for writing. Until it is closed, at the end of the block, the file is locked.

    If the block raises, the file is removed.

    Args:
        path: The path, at which there must be nothing.
        mode: The permissions of the file, from which the umask takes some.
    """
    _unfinished.add(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor has no path
            if sys.platform != "win32":
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove the files that this process is writing, before it ends at once."""
    for path in tuple(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files in a folder that processes of this machine left when they were killed."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name) if entry.name.endswith(_SUFFIX) else None
            if match is not None and _is_gone(match["machine"], int(match["process"]), int(match["start"])):
                _remove_unlocked(Path(entry.path))


def _is_gone(machine: str, process: int, start: int) -> bool:
    """Whether a process of this machine has ended. Its number may stand for another process by now."""
    if machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    now = _start_of(process)
    return now is not None and start != 0 and now != start


def _remove_unlocked(path: Path) -> None:
    """Remove a file if nobody holds its lock."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.lstat()):
                path.unlink()
        finally:
            os.close(descriptor)


@cache
def _machine() -> str:
    """Return eight digits for the name of the machine or container. Windows removes nothing and needs none."""
    return f"{zlib.crc32(os.uname().nodename.encode()) if hasattr(os, 'uname') else 0:08x}"


def _start_of(process: int) -> int | None:
    """Return when a process started, in clock ticks since the machine did; None where the system does not say."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # the name of the program, in brackets, may hold anything
