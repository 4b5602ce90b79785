"""Evidence for the CLEAN and BROKEN cases of the checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnlab.observe.evidence import Floats, Hyperparameters, LayerState, NetworkState

__all__ = ["healthy", "network", "of", "untrained"]


def healthy(
    name: str = "bn",
    *,
    running_mean: Sequence[float] = (0.3, -0.7, 0.1, 1.2),
    running_var: Sequence[float] = (0.8, 2.0, 0.4, 1.1),
    weight: Sequence[float] | None = (0.9, 1.1, 1.0, 0.7),
    bias: Sequence[float] | None = (0.0, 0.2, -0.1, 0.05),
    num_batches_tracked: int | None = 1000,
    dtype: str = "float32",
    affine_dtype: str | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> LayerState:
    """Return a trained layer of four channels; every part can be replaced."""
    return LayerState(
        name=name,
        running_mean=_column(running_mean),
        running_var=_column(running_var),
        weight=None if weight is None else _column(weight),
        bias=None if bias is None else _column(bias),
        num_batches_tracked=num_batches_tracked,
        dtype=dtype,
        affine_dtype=affine_dtype or dtype,
        hyperparameters=Hyperparameters(momentum, eps, assumed=()),
    )


def untrained(name: str = "bn", *, num_batches_tracked: int | None = 0) -> LayerState:
    """Return a layer as its constructor leaves it."""
    return healthy(
        name,
        running_mean=(0, 0, 0, 0),
        running_var=(1, 1, 1, 1),
        weight=(1, 1, 1, 1),
        bias=(0, 0, 0, 0),
        num_batches_tracked=num_batches_tracked,
    )


def network(*layers: LayerState) -> NetworkState:
    """Return a network of these layers."""
    return NetworkState("", layers)


def of(**changes: object) -> NetworkState:
    """Return a network of one healthy layer with some parts replaced."""
    return network(healthy(**changes))  # type: ignore[arg-type]  # the parts of `healthy`, typed there


def _column(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)
