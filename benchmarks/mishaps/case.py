"""The class of a case, and the registry of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.lab import metrics

from .networks import ARCHITECTURES, Trained, build, trained

__all__ = ["HEALTHY", "MISHAPS", "Absent", "Case", "Setting", "Subject", "healthy", "mishap"]


class Absent(Exception):
    """The data of a case is not on this machine."""


@dataclass(frozen=True)
class Setting:
    """The seed and the architecture of a case.

    Attributes:
        seed: The seed of the weights, the order of the batches and everything else that is random.
        architecture: The architecture in place of the usual "cnn"; one that is not used for calibration, or "cnn".
    """

    seed: int
    architecture: str = "cnn"

    @property
    def held_out(self) -> bool:
        """Whether the architecture is not used for calibration."""
        return self.architecture != "cnn"

    def network(self, name: str = "cnn") -> Trained:
        """Return a copy of a trained network. The architecture of the setting replaces "cnn"."""
        return trained(self.architecture if name == "cnn" else name, self.seed)

    def untrained(self, *, momentum: float | None = 0.1) -> nn.Module:
        """Return the architecture of the setting with its first weights."""
        return build(ARCHITECTURES[self.architecture], self.seed, momentum=momentum)


@dataclass(frozen=True)
class Subject:
    """The arguments of `bnlab.check`.

    Attributes:
        model: The network.
        data: The evaluation data.
        train_data: The training data.
        metric: A metric; higher is better.
        loss: The loss of a model and a batch.
        optimizer: The optimizer of the training.
        planted: The paths of the layers with planted stale statistics, if these are some of many layers.
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
    """A case: its name, its description, and the function that builds it."""

    name: str
    about: str
    build: Callable[[Setting], Subject]


MISHAPS: dict[str, Case] = {}
HEALTHY: dict[str, Case] = {}


def mishap(build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    """Register a network with one planted cause under the name of its function."""
    return _register(MISHAPS, build)


def healthy(build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    """Register a healthy network under the name of its function."""
    return _register(HEALTHY, build)


def _register(cases: dict[str, Case], build: Callable[[Setting], Subject]) -> Callable[[Setting], Subject]:
    name = build.__name__
    cases[name] = Case(name, (build.__doc__ or "").strip(), build)
    return build
