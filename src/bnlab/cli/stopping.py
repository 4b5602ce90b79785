"""Ends a command on SIGTERM or SIGHUP as on an error: cleaned up, with an exit code that names the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from bnlab.partial_file import remove_unfinished

__all__ = ["Stopped", "leave", "stops_on_signals"]

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

_REPEAT = 1.0
"""Seconds in which a second signal is ignored, because it would interrupt the cleaning up."""

_PATIENCE = 5.0
"""Seconds after which the process ends although its main thread has not come back from a native function."""


_pipe_is_set = False
"""Whether signals of this process wake a thread."""


class Stopped(SystemExit):
    """The end of the command because of a signal, with the exit code that shells use: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextlib.contextmanager
def stops_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread where the block gets a signal that would end the process at once.

    A caller who handles or ignores a signal keeps that, and afterwards all signals have the handlers they had before.
    In another thread, this does nothing. Processes that are forked in the block end at once, as without it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    handler = _Handler()
    for number in numbers:
        signal.signal(number, handler)
    try:
        with _watched(numbers):
            yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)


def leave(stopped: Stopped) -> NoReturn:
    """End the process, also where threads that are no daemons would keep it alive."""
    helpers = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if any(thread.is_alive() and not thread.daemon for thread in helpers):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):
                stream.flush()
        os._exit(_exit_code(stopped))
    raise stopped


def _exit_code(stopped: Stopped) -> int:
    return int(str(stopped.code))


class _Handler:
    """Raises `Stopped`, but not twice in a short time: two signals at once are one wish."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._last: float | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._last is None or now - self._last > _REPEAT:
            self._last = now
            raise Stopped(number)


@contextlib.contextmanager
def _watched(numbers: list[signal.Signals]) -> Iterator[None]:
    """End the process from a thread if a signal comes and the main thread does not leave the block.

    Python runs handlers between two instructions of the main thread, so a native function that takes minutes would
    delay the end by minutes.
    """
    global _pipe_is_set
    reader, writer = (-1, -1) if sys.platform == "win32" else os.pipe()
    if reader == -1 or not _set_pipe(writer):
        yield
        return
    _pipe_is_set, process, is_over = True, os.getpid(), threading.Event()
    thread = threading.Thread(target=_watch, args=(reader, set(numbers), is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        if os.getpid() == process:  # a forked process that leaves the block has none of this
            signal.set_wakeup_fd(-1)
            _pipe_is_set = False
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)


def _set_pipe(writer: int) -> bool:
    """Let signals write into a pipe, unless they write into another one, as for an event loop around the command."""
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
    return before == -1


def _watch(reader: int, numbers: set[signal.Signals], is_over: threading.Event) -> None:
    while not is_over.is_set():
        for number in os.read(reader, 64):
            if number in numbers and not is_over.wait(_PATIENCE):
                remove_unfinished()
                os._exit(128 + number)


def _forget_pipe() -> None:
    """In a forked process, signals must not wake the thread of its parent."""
    if _pipe_is_set:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pipe)
