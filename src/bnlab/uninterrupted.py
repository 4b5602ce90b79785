"""Lets restorations run to their end: Ctrl-C and other signals wait until a function that restores something is over.

Python runs the handler of a signal between any two instructions of the main thread, also between the ``finally`` of a
block and the first line in it. A flag that the restoration sets would come too late. Therefore the handler itself looks
at the calls that it interrupts, and waits if one of them is a function that must finish.
"""

from __future__ import annotations

import functools
import importlib
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import ParamSpec, TypeVar, cast

__all__ = ["SignalsHeld", "finishes", "import_whole", "restores"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Handler = Callable[[int, FrameType | None], object]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name)]

_finishing: set[CodeType] = set()
_waiting: list[int] = []
_handlers: dict[int, _Handler] = {}
_depth = 0


def finishes(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark a function that runs to its end before the handler of a signal runs.

    This holds from its first instruction on, within a block of `SignalsHeld`. A handler that had to wait runs when the
    function returns or raises.
    """

    @functools.wraps(function)
    def whole(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        finally:
            _run_handlers(sys._getframe(1))  # noqa: SLF001 - the documented way to the caller

    _finishing.add(cast("FunctionType", whole).__code__)
    return whole


class SignalsHeld(AbstractContextManager[None]):
    """A block in which signals wait for the functions that `finishes` marks. Blocks may be nested.

    Handlers belong to the main thread. In another thread the block does nothing, and nothing interrupts it.
    """

    _holds = False

    def __enter__(self) -> None:
        global _depth
        if not _is_main_thread():
            return
        try:
            _install()
            _depth += 1
            self._holds = True
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _depth
        if self._holds:
            self._holds = False
            _depth -= 1
        if _depth == 0 and _is_main_thread():
            _uninstall()


class _Restoring(_GeneratorContextManager[_R]):
    def __enter__(self) -> _R:
        self._signals = SignalsHeld()
        try:
            self._signals.__enter__()
            return self._begin()
        except BaseException:
            self.gen.close()
            self._signals.__exit__(None, None, None)
            raise

    @finishes
    def _begin(self) -> _R:
        return super().__enter__()

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return super().__exit__(kind, error, trace)
        finally:
            self._signals.__exit__(kind, error, trace)


def restores(function: Callable[_P, Iterator[_R]]) -> Callable[_P, AbstractContextManager[_R]]:
    """Turn a generator into a context manager, as `contextlib.contextmanager` does; what surrounds its yield finishes.

    So an interrupt comes before the generator begins, in the block, or when everything is restored.
    """

    @functools.wraps(function)
    def begin(*args: _P.args, **kwargs: _P.kwargs) -> AbstractContextManager[_R]:
        return _Restoring(cast("Callable[_P, Generator[_R]]", function), args, kwargs)

    return begin


def import_whole(name: str) -> ModuleType:
    """Import a module to its end, also if a signal arrives: half an import of torch cannot be repeated.

    The random numbers of Python continue as before, because some modules draw from them when they are imported.
    """
    if name in sys.modules:
        return importlib.import_module(name)
    with SignalsHeld():
        return _import(name)


@finishes
def _import(name: str) -> ModuleType:
    state = random.getstate()
    try:
        return importlib.import_module(name)
    finally:
        random.setstate(state)


@finishes
def _install() -> None:
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _wait_or_handle:
            _handlers[number] = handler
            signal.signal(number, _wait_or_handle)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _uninstall() -> None:
    for number, handler in _handlers.items():
        if signal.getsignal(number) is _wait_or_handle:  # a caller may have set another one in the block
            signal.signal(number, handler)


def _wait_or_handle(number: int, frame: FrameType | None) -> None:
    if not _must_finish(frame):
        _handlers[number](number, frame)
    elif number not in _waiting:  # the system keeps one of several equal signals too
        _waiting.append(number)


def _run_handlers(frame: FrameType | None) -> None:
    while _waiting and not _must_finish(frame):
        number = _waiting.pop(0)
        _handlers[number](number, frame)


def _must_finish(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _finishing:
            return True
        frame = frame.f_back
    return False
