"""What a training loop of the benchmark consists of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

import bnlab
from benchmarks.watching.networks import CLASSES, Build
from bnlab.watching.events import Event
from bnlab.watching.watch import Watch

__all__ = ["Loop", "Outcome", "batch", "optimizer_of", "train", "watched"]


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Attributes:
        name: What happens in it.
        run: Trains a network that it builds with a function, and returns what the watch saw.
        code: The code of the first event; None for a healthy loop.
    """

    name: str
    run: Callable[[Build], Outcome]
    code: str | None = None


@dataclass
class Outcome:
    """What a watch saw in a loop, and what it should have seen.

    Attributes:
        events: The events.
        step: The right step of the first event.
        layer: The right layer of the first event.
    """

    events: list[Event] = field(default_factory=list)
    step: int = 0
    layer: str = ""

    def is_right(self, code: str | None) -> bool:
        """Return whether the first event has this code, and the right step and layer; or there is none for None."""
        if code is None or not self.events:
            return code is None and not self.events
        first = self.events[0]
        return (first.code, first.step, first.layer) == (code, self.step, self.layer)


@contextmanager
def watched(model: nn.Module, optimizer: Any, outcome: Outcome, **options: Any) -> Iterator[Watch]:  # noqa: ANN401
    """Watch a model in the block, without warnings, and add the events to the outcome."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnlab.errors.BnlabWarning)
        watch = bnlab.watch(model, optimizer, **{"every": 10, **options})
        with watch:
            yield watch
        outcome.events += watch.events


def optimizer_of(model: nn.Module, rate: float = 0.02) -> torch.optim.Optimizer:
    """Return SGD for the parameters that require gradients."""
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=rate, momentum=0.9)


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    """Return images of four classes, which differ in brightness and contrast, and their labels."""
    labels = torch.randint(0, CLASSES, (size,))
    scale = 1 + 0.2 * labels.view(-1, 1, 1, 1)
    return torch.randn(size, 3, 8, 8) * scale + 0.1 * labels.view(-1, 1, 1, 1), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, size: int = 16) -> None:
    """Take ordinary steps."""
    for _ in range(steps):
        x, labels = batch(size)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
