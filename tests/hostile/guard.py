"""Watches what a process does while it reads a file: nothing that the file names may be imported, called or opened."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Misdeed", "TooSlow", "guarded", "unwatched"]

_FORBIDDEN = (
    *("exec", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"),
    *("os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.putenv", "os.startfile"),
    *(
        "subprocess.",
        "socket.",
        "shutil.",
        "ctypes.dlopen",
        "pickle.find_class",
        "marshal.load",
        "urllib.",
        "webbrowser.",
    ),
)
_OWN_IMPORTS = frozenset(
    {"bnlab", "numpy", "onnx", "google", "h5py", "msgpack", "torch", "jsonschema", "ml_dtypes", "rich"}
)
"""Packages that readers import when they meet a format for the first time; the mutations name others."""


class Misdeed(BaseException):
    """The reader did something that a file must not make it do."""


class TooSlow(BaseException):
    """The reader took too much time of the processor, or too much memory."""


class _Watch:
    """The one audit hook of the process, which cannot be removed; it acts while there is a folder to read."""

    folder: str | None = None
    misdeeds: list[str]
    is_installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            self.judge_open(arguments)
        elif event.startswith(_FORBIDDEN) and not _importing():
            self.misdeeds.append(f"{event} {arguments!r}"[:200])

    def find_spec(self, name: str, *_: object) -> None:
        """Note an import of a module that is not there yet, as a finder of modules, and leave it to the next finder."""
        if self.folder is not None and name.partition(".")[0] not in _OWN_IMPORTS | sys.stdlib_module_names:
            self.misdeeds.append(f"imports {name}")

    def judge_open(self, arguments: tuple[Any, ...]) -> None:
        path, mode, flags = arguments
        if isinstance(path, int) or path is None:
            return
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a hook must not import
        writes = (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)) or (
            isinstance(mode, str) and mode[0] != "r"
        )
        inside = name.startswith(str(self.folder)) or _importing() or name.endswith((".py", ".pyc"))
        if writes or not inside:
            self.misdeeds.append(f"opens {name}")


def _importing() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_WATCH = _Watch()


@contextmanager
def guarded(folder: Path, seconds: float, megabytes: float) -> Iterator[None]:
    """Allow only files in a folder to be opened, and limit the time of the processor and the growth of the memory.

    Raises:
        Misdeed: If the block opens, imports or runs something else.
        TooSlow: If the block takes too long or too much memory.
    """
    if not _Watch.is_installed:
        sys.addaudithook(_WATCH)
        sys.meta_path.insert(0, _WATCH)  # importlib.import_module raises no event
        _Watch.is_installed = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGPROF, _too_slow)
    keeps_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a late import is no misdeed
    _WATCH.misdeeds, _WATCH.folder = [], str(folder)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:  # a file that is refused may not do more than one that is read
        signal.setitimer(signal.ITIMER_PROF, 0)
        _WATCH.folder = None
        sys.dont_write_bytecode = keeps_none
        signal.signal(signal.SIGPROF, old)
        if _WATCH.misdeeds:
            raise Misdeed("; ".join(_WATCH.misdeeds))
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if growth > megabytes:
            raise TooSlow(f"takes {growth:.0f} MB")


@contextmanager
def unwatched() -> Iterator[None]:
    """Let a test do what the reader must not do."""
    folder, _WATCH.folder = _WATCH.folder, None
    try:
        yield
    finally:
        _WATCH.folder = folder


def _too_slow(*_: object) -> None:
    raise TooSlow("takes too long")
