"""What a case is, and the register of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.lab import metrics

from .networks import HELD_OUT, Trained, trained

__all__ = ["HEALTHY", "MISHAPS", "Absent", "Case", "Setting", "Subject", "healthy", "mishap"]


class Absent(Exception):
    """The data a case needs is not on this machine."""


@dataclass(frozen=True)
class Setting:
    """Where a case is built.

    Attributes:
        seed: Of weights, order of the batches and everything else that is drawn.
        held_out: Whether the architecture that is not used for calibration takes the place of the usual one.
    """

    seed: int
    held_out: bool = False

    def network(self, name: str = "cnn") -> Trained:
        """Return a trained network of its own; the usual architecture gives way to the held-out one."""
        return trained(HELD_OUT if self.held_out and name == "cnn" else name, self.seed)


@dataclass(frozen=True)
class Subject:
    """What is handed to `bnlab.check`.

    Attributes:
        model: The network.
        data: What it will see.
        train_data: What it was trained on.
        metric: Higher is better.
        loss: Of a model and a batch.
        optimizer: It is trained with.
        planted: Paths of the layers whose statistics were planted to be stale, where those are some of many.
    """

    model: nn.Module
    data: Iterable[Any]
    train_data: Iterable[Any] | None = None
    metric: Callable[[nn.Module, Any], float] | None = metrics.accuracy
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    planted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One case: a name, what it is about, and how to build it."""

    name: str
    about: str
    build: Callable[[Setting], Subject]


MISHAPS: dict[str, Case] = {}
HEALTHY: dict[str, Case] = {}


def mishap(build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    """Register a network with one planted cause under the name of its function."""
    return _register(MISHAPS, build)


def healthy(build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    """Register a network with nothing the matter."""
    return _register(HEALTHY, build)


def _register(cases: dict[str, Case], build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    name = build.__name__
    cases[name] = Case(name, (build.__doc__ or "").strip(), build)
    return build
