"""The order in which layers run, and ways to leave a forward pass early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnlab.observe.passes.batches import tensors_in

__all__ = ["AllSeen", "ExecutionOrder", "OneValue", "input_of"]


class AllSeen(BaseException):
    """Raised to leave a forward pass after the last BN layer; no `except Exception` of a model may catch it."""


class OneValue(BaseException):
    """Raised to leave a forward pass at a layer that has one value per channel."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass
class ExecutionOrder:
    """The order of the layers, and how many calls the first batch made, so that later ones may stop after the last.

    If the first batch left a layer out, or ran one twice, every batch runs to its end: others may differ.

    Attributes:
        layers: Number of layers that are watched.
        calls: Calls in this batch so far.
        seen: Paths of the layers, in the order in which they ran first.
        expected: Calls after which a batch may stop; 0 for never, None before that is known.
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
            self.expected = 0  # the batches differ: run each to its end
        self.calls = 0

    def count(self, path: str) -> None:
        """Note a call.

        Raises:
            AllSeen: If it is the last one of the batch.
        """
        self.calls += 1
        self.seen[path] = None
        if self.expected and self.calls == self.expected:
            raise AllSeen


def input_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the input of a call: the first tensor."""
    first = arguments[0] if arguments else None
    return first if isinstance(first, Tensor) else tensors_in([arguments, keywords])[0]
