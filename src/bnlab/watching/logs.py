"""Where a watch writes what it sees: a function that takes a dict, a TensorBoard writer, or a file of JSON lines."""

from __future__ import annotations

import inspect
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Union, runtime_checkable

import torch

from bnlab.atomic_file import require_writable
from bnlab.errors import BnlabWarning, UnwritableFile, UsageError
from bnlab.records.document import to_json
from bnlab.wording import reason_of

__all__ = ["EventCounts", "Log", "LogTarget", "TensorBoardWriter", "event_text", "log_of", "value_key"]

_ROOT = "bnlab"

STEP_KEY = f"{_ROOT}/step"
"""The key of the step, for functions that take no step of their own."""


@runtime_checkable
class Log(Protocol):
    """Where a watch writes."""

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Write measured values by key, at a step."""

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:
        """Write an event."""


@runtime_checkable
class TensorBoardWriter(Protocol):
    """What a SummaryWriter of torch.utils.tensorboard or tensorboardX can do."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:  # noqa: ANN401 - that of the writer
        """Write one number."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:  # noqa: ANN401 - that of the writer
        """Write one text."""


LogTarget = Union[Callable[..., Any], TensorBoardWriter, Log, str, "os.PathLike[str]", None]
"""What `bnlab.watch` takes as `log`."""


def value_key(layer: str, name: str) -> str:
    """Return the key of a value of a layer.

    Example:
        >>> value_key("layer1.0.bn1", "lag"), value_key("", "lag")
        ('bnlab/layer1.0.bn1/lag', 'bnlab/model/lag')
    """
    return f"{_ROOT}/{layer or 'model'}/{name}"


def event_text(code: str, name: str, layer: str, message: str) -> str:
    """Return an event in one line.

    Example:
        >>> event_text("BN605", "TrainedInEvalMode", "", "in eval mode in 8 steps")
        'BN605 TrainedInEvalMode, the model itself: in eval mode in 8 steps'
    """
    return f"{code} {name}, {layer or 'the model itself'}: {message}"


def log_of(log: LogTarget) -> Log:
    """Return what writes to a target.

    An event adds one to the number at the key "bnlab/events/<code>". TensorBoard gets its text too, and a JSON line
    has all of it.

    Args:
        log: A function that takes a dict of numbers by key. One with a parameter `step`, such as `wandb.log`, gets the
            step there, another one at the key "bnlab/step". Or a SummaryWriter. Or the path of a file to which JSON
            lines are appended, each one whole, so that ranks and restarts may share a file. A `Log` stays as it is, and
            None writes nothing.

    Raises:
        UsageError: If it is none of these.
        UnwritableFile: If the file cannot be appended to.
    """
    if log is None:
        return _Silent()
    if isinstance(log, (str, os.PathLike)):
        return _JsonLines(Path(log))
    if isinstance(log, Log):
        return log
    if isinstance(log, TensorBoardWriter):
        return _TensorBoard(log)
    if callable(log):
        return _Function(log)
    raise UsageError(
        f"watch: log must be a function that takes a dict, a SummaryWriter or a path, got {type(log).__name__}. "
        'Pass log="bnlab.jsonl" to append JSON lines to a file.'
    )


class _Silent:
    """Writes nothing."""

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Write nothing."""

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:
        """Write nothing."""


class EventCounts:
    """Counts the events of each code."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, code: str) -> tuple[str, int]:
        """Return the key of a code, and how many events it has now."""
        self._counts[code] += 1
        return f"{_ROOT}/events/{code}", self._counts[code]


class _Function:
    """Calls a function with a dict of numbers by key."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._takes_step = _takes_step(function)
        self._events = EventCounts()

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the values on."""
        if self._takes_step:
            self._function(dict(values), step=step)
        else:
            self._function({**values, STEP_KEY: float(step)})

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:  # noqa: ARG002 - numbers alone
        """Pass on how many events of this code there are."""
        key, count = self._events.add(code)
        self.values(step, {key: float(count)})


class _TensorBoard:
    """Writes to a SummaryWriter."""

    def __init__(self, writer: TensorBoardWriter) -> None:
        self._writer = writer
        self._events = EventCounts()

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:
        """Write how many events of this code there are, and the text of this one."""
        key, count = self._events.add(code)
        self._writer.add_scalar(key, float(count), step)
        self._writer.add_text(key, event_text(code, name, layer, message), step)


class _JsonLines:
    """Appends one line of JSON per call to a file.

    Every line is one write at the end of the file, so that lines of several processes do not mix. A file that ends in
    the middle of a line, as after a crash, gets the end of the line first.
    """

    def __init__(self, path: Path) -> None:
        require_writable(path, option="log")
        if path.exists() and not path.is_file():
            raise UnwritableFile(
                f"log: path must be that of a regular file, got {path}. Pass a function to write elsewhere."
            )
        self._path = path.absolute()
        self._has_failed = False
        self._ends_with_a_line = False

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Append the step and the values."""
        self._append({"step": step, **values})

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:
        """Append the step and the event."""
        self._append({"step": step, "event": code, "name": name, "layer": layer, "message": message})

    def _append(self, line: dict[str, object]) -> None:
        line = {"time": round(time.time(), 3), **_rank(), **line}
        text = json.dumps(to_json(line), allow_nan=False) + "\n"
        try:
            self._write(text.encode())
        except OSError as err:
            self._warn(err)

    def _write(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self._path, flags, 0o666)
        try:
            if not self._ends_with_a_line and not _ends_with_a_line(descriptor):
                line = b"\n" + line
            self._ends_with_a_line = os.write(descriptor, line) == len(line)
        finally:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        """Warn once: a log that cannot be written is no reason to end a training run."""
        if not self._has_failed:
            self._has_failed = True
            warnings.warn(
                f"log: {self._path} must be writable, got: {reason_of(error)}. The run goes on, and lines are missing.",
                BnlabWarning,
                stacklevel=2,
            )


def _ends_with_a_line(descriptor: int) -> bool:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if not size:
        return True
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) == b"\n"


def _rank() -> dict[str, object]:
    """Return the rank of this process, where there are several."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return {}
    return {"rank": distributed.get_rank()}


def _takes_step(function: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter `step` that can be passed by name."""
    try:
        parameter = inspect.signature(function).parameters.get("step")
    except (TypeError, ValueError):  # some functions of C have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameter is not None and parameter.kind in kinds
