"""Names what went wrong before the statistics of a layer were stale: a momentum, missing updates, several calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnlab.conventions import LARGE_MOMENTUM, SETTLED_WEIGHT, TORCH_MOMENTUM
from bnlab.observe.initial_values import has_initial_values, is_barely_updated, updates_needed, why_counter_is_wrong
from bnlab.observe.model_evidence import ModelLayer

__all__ = ["Upstream", "momentum_advice", "upstream_of"]

_BETWEEN_CALLS = 0.1
"""Difference between the calls of a layer within one pass, in standard deviations, above which it matters."""

_TRAINING = 100_000
"""Number of updates that a long training makes."""


@dataclass(frozen=True)
class Upstream:
    """A reason for statistics that are not those of the training data.

    Attributes:
        name: A short name, such as "momentum".
        fault: The reason as a noun phrase.
        detail: The numbers behind it and the way out; "" where there are none.
        causes: The causes of a gap that it explains.
    """

    name: str
    fault: str
    detail: str = ""
    causes: tuple[str, ...] = ("staleness", "staleness or shift")

    @property
    def phrase(self) -> str:
        """The fault, with the detail in brackets."""
        return f"{self.fault} ({self.detail})" if self.detail else self.fault


def upstream_of(layer: ModelLayer) -> Upstream | None:
    """Return the reason for stale statistics of a layer; None where nothing but their distance is known."""
    return _of_calls(layer) or _of_updates(layer)


def momentum_advice(updates: int) -> str:
    """Return the momentum with which the initial values lose their weight in so many updates, as a clause.

    It is 0.1 where that is enough, and None where a number would keep the last batch or two alone.
    """
    needed = math.ceil(100 * (1 - float(SETTLED_WEIGHT ** (1 / max(updates, 1))))) / 100
    momentum = max(TORCH_MOMENTUM, needed)
    return f"momentum {momentum:.2g} would do" if momentum <= LARGE_MOMENTUM else "momentum None would do"


def _of_calls(layer: ModelLayer) -> Upstream | None:
    calls = 1 if layer.execution is None else layer.execution.calls
    between = layer.between_calls
    if calls < 2 or between <= _BETWEEN_CALLS:
        return None
    return Upstream(
        "calls that differ",
        "calls within one pass that differ",
        f"{calls} calls, which are {between:.2g} standard deviations apart: use one BN per call",
        ("staleness", "staleness or shift", "heterogeneity", "training heterogeneity"),
    )


def _of_updates(layer: ModelLayer) -> Upstream | None:
    state, momentum = layer.state, layer.momentum
    if state is None:
        return None
    if momentum == 0:
        return Upstream("momentum 0", "momentum 0", f"it never updates the statistics: {TORCH_MOMENTUM:g} would do")
    if has_initial_values(state):
        return Upstream("never updated", "statistics that were never updated")
    if momentum is None:
        return None
    counter = state.num_batches_tracked
    if counter and why_counter_is_wrong(state) is None and is_barely_updated(state):
        needed = updates_needed(momentum, SETTLED_WEIGHT)
        return Upstream(
            "barely updated",
            "statistics that were barely updated",
            f"momentum {momentum:g} needs {needed:,.0f} updates and got {counter:,}: {momentum_advice(counter)}",
        )
    if updates_needed(momentum, SETTLED_WEIGHT) > _TRAINING:
        return Upstream("momentum", f"momentum {momentum:g}", f"an update changes nothing: {TORCH_MOMENTUM:g} would do")
    if momentum > LARGE_MOMENTUM:
        return Upstream(
            "momentum",
            f"momentum {momentum:g}",
            f"the statistics are those of the last batch{' or two' if momentum < 1 else ''}: "
            f"{TORCH_MOMENTUM:g} would do",
        )
    return None
