"""Tracks the order in which layers run, and leaves a forward pass early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnlab.observe.passes.tensors import tensors_in

__all__ = ["ExecutionOrder", "ForwardEnded", "OneValuePerChannel", "input_of"]


class ForwardEnded(BaseException):
    """Raised to leave a forward pass after the last BN layer. An `except Exception` in a model does not catch it."""


class OneValuePerChannel(BaseException):
    """Raised to leave a forward pass at a layer whose input has one value per channel."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass
class ExecutionOrder:
    """The order of the layers, and the number of calls in the first batch, after which later batches may stop.

    If the first batch skips a layer or runs one twice, every batch runs to its end, because other batches may differ.

    Attributes:
        layers: Number of layers that are watched.
        calls: Number of calls in this batch so far.
        seen: Paths of the layers, in the order of their first calls.
        expected: Number of calls after which a batch may stop; 0 for never, None until it is known.
    """

    layers: int
    calls: int = 0
    seen: dict[str, None] = field(default_factory=dict)
    expected: int | None = None

    def begin(self) -> None:
        """Begin a batch."""
        if self.expected is None and self.calls:
            self.expected = self.calls if len(self.seen) == self.calls == self.layers else 0
        elif self.expected is not None and self.calls != self.expected:
            self.expected = 0  # the batches differ, so each runs to its end
        self.calls = 0

    def count(self, path: str) -> None:
        """Count a call of a layer.

        Raises:
            ForwardEnded: If the call is the last one of the batch.
        """
        self.calls += 1
        self.seen[path] = None
        if self.expected and self.calls == self.expected:
            raise ForwardEnded


def input_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the first tensor among the arguments of a call, which is its input."""
    first = arguments[0] if arguments else None
    return first if isinstance(first, Tensor) else tensors_in([arguments, keywords])[0]
