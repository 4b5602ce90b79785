"""The arguments that every BN layer takes."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

import torch

from bnlab.errors import UsageError
from bnlab.functional.activations import Activation, activation_function

__all__ = ["MOMENTUM_WAY_OUT", "Nonfinite", "Options", "check_options"]

Nonfinite = Literal["skip", "propagate"]

MOMENTUM_WAY_OUT = "Pass the weight of the new batch, 1 - decay."


class Options(TypedDict, total=False):
    """The keyword arguments that every BN layer takes, as in :class:`bnlab.nn.base.BatchNormBase`."""

    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    device: torch.device | str | int | None
    dtype: torch.dtype | None
    bias: bool
    activation: Activation | None
    nonfinite: Nonfinite
    statistics_dtype: torch.dtype | None


def check_options(
    name: str,
    eps: float,
    momentum: float | None,
    activation: str | None,
    nonfinite: str,
    statistics_dtype: torch.dtype | None,
) -> None:
    """Check the constructor arguments of a layer; `name` is its class, with which the message begins.

    Raises:
        UsageError: If an argument has a value that is not allowed.
    """
    if not (eps >= 0 and math.isfinite(eps)):
        raise UsageError(f"{name}: eps must be finite and >= 0, got {eps}.")
    if momentum is not None and not 0 <= momentum <= 1:
        raise UsageError(f"{name}: momentum must be in [0, 1] or None, got {momentum}. {MOMENTUM_WAY_OUT}")
    if statistics_dtype is not None and not getattr(statistics_dtype, "is_floating_point", False):
        raise UsageError(f"{name}: statistics_dtype must be a floating torch.dtype or None, got {statistics_dtype!r}.")
    if nonfinite not in ("skip", "propagate"):
        raise UsageError(f"{name}: nonfinite must be 'skip' or 'propagate', got {nonfinite!r}.")
    activation_function(activation)
