"""Computes what the counter of a layer says about the weight that the initial values keep in its statistics."""

from __future__ import annotations

import math

from bnlab.observe.evidence import LayerState

__all__ = ["has_initial_values", "initial_weight", "updates_needed", "why_counter_is_wrong"]

_ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def has_initial_values(state: LayerState) -> bool:
    """Return whether every running mean is 0 and every running variance is 1."""
    return not bool((state.running_mean != 0).any() or (state.running_var != 1).any())


def initial_weight(state: LayerState) -> float:
    """Return the weight (1 - a)^k of the initial values after k updates with momentum a.

    It is 0 for a cumulative average, whose first batch replaces the initial values, and without a counter.
    """
    momentum, counter = state.hyperparameters.momentum, state.num_batches_tracked
    return 0.0 if momentum is None or counter is None else float((1 - momentum) ** counter)


def updates_needed(momentum: float, weight: float) -> float:
    """Return the number of updates after which the initial values have this weight; inf for momentum 0."""
    if momentum <= 0:
        return math.inf
    return 1.0 if momentum >= 1 else math.log(weight) / math.log1p(-momentum)


def why_counter_is_wrong(state: LayerState) -> str | None:
    """Return why `num_batches_tracked` and momentum cannot be those of the statistics; None if they may be.

    A variance that began at 1 cannot be below (1 - a)^k.
    """
    counter, momentum = state.num_batches_tracked, state.hyperparameters.momentum
    if counter is None:
        return "num_batches_tracked is absent"
    if momentum is None:
        return None
    if counter < 0:
        return "num_batches_tracked is negative"
    if counter == 0 and not has_initial_values(state):
        return "num_batches_tracked is 0 although the statistics are not the initial ones"
    rounding = min(0.5, (counter + 1) * _ROUNDING.get(state.dtype, 0.0))  # each update rounds once
    if (state.running_var < initial_weight(state) * (1 - rounding)).any():
        return f"num_batches_tracked and momentum {momentum:.3g} contradict running_var"
    return None
