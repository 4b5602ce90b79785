"""Finds what hangs on an assumption: a check that would fire without it, and layers whose output eps changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bnlab.checks.bn105_statistics_barely_updated import Limits, StatisticsBarelyUpdated
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState
from bnlab.observe.initial_values import has_initial_values, weight_that_matters
from bnlab.records import Finding

__all__ = ["assumed_defaults", "assumption_behind", "eps_that_matters"]

_SMALLEST_MOMENTUM = 0.001
"""The smallest momentum that trainings use."""

_USUAL_EPS = (1e-5, 1e-3)
"""The defaults of torch and of Keras, in squared input units."""

_MIN_CHANGE = 0.1
"""Relative change of an output between the usual values of eps from which on eps must be stated."""


def assumption_behind(settings: Settings, networks: Iterable[NetworkState], findings: Sequence[Finding]) -> str | None:
    """Return how the verdict on the age of the statistics hangs on the assumed momentum; None where it does not.

    After k updates with momentum a, the initial variance 1 has the weight (1 - a)^k, so that a running variance below
    this weight proves that the momentum is not so small. The check also asks what this weight changes in the output.

    Args:
        settings: The selected checks, and the codes whose findings are dropped.
        networks: The stored numbers.
        findings: The findings on them.
    """
    check = next((one for one in settings.checks if isinstance(one, StatisticsBarelyUpdated)), None)
    if (
        check is None
        or check.code in settings.ignore
        or any(finding.code in (check.code, "BN104") for finding in findings)
    ):
        return None
    bound, assumed = _SMALLEST_MOMENTUM, None
    for layer in (layer for network in networks for layer in network.layers):
        updates = layer.num_batches_tracked
        if "momentum" not in layer.hyperparameters.assumed or not updates or check.lacks(layer) is not None:
            continue
        weight = _weight_below(check.limits, layer, (1 - bound) ** updates)
        if weight is not None:
            bound, assumed = 1 - weight ** (1 / updates), layer.hyperparameters.momentum
    if assumed is None:
        return None
    return f"{check.code} would fire at a momentum below {bound:.3g} ({assumed:.3g} is assumed)"


def _weight_below(limits: Limits, layer: LayerState, ceiling: float) -> float | None:
    """Return the weight of the initial values from which on they matter, if it is below a ceiling.

    The largest momentum belongs to the smallest weight, so that a layer that does not lower it is looked at once.
    """
    if not (layer.running_mean != 0).any():
        return None
    return weight_that_matters(
        layer, weight=limits.initial_weight, effect=limits.effect, channels=limits.channels, ceiling=ceiling
    )


def assumed_defaults(evidence: Evidence, total: int) -> Iterator[str]:
    """Yield a note on each default that is assumed: its value, the library that has it, and the number of layers.

    Args:
        evidence: The stored numbers.
        total: The number of all layers.
    """
    known = [layer.hyperparameters for network in evidence.networks for layer in network.layers]
    for name in ("momentum", "eps"):
        counts = Counter((getattr(one, name), one.house) for one in known if name in one.assumed)
        for (value, house), count in counts.items():
            if house == Hyperparameters.house:
                yield f"{name} {value:g} is assumed in {count} of {total} layers: a state dict does not hold it"
            else:
                yield (
                    f"{name} {value:g}, the default of {house}, is assumed in {count} of {total} layers: "
                    f"the file does not hold it"
                )


def eps_that_matters(evidence: Evidence) -> Iterator[str]:
    """Yield a note on the layer whose output eps changes most, where eps is assumed and matters.

    The change is that of the median channel: sqrt((var + 1e-3)/(var + 1e-5)) - 1.
    """
    low, high = _USUAL_EPS
    changes: list[tuple[float, str, float]] = []
    for layer in (layer for network in evidence.networks for layer in network.layers):
        var = layer.running_var[np.isfinite(layer.running_var) & (layer.running_var >= 0)]
        if "eps" in layer.hyperparameters.assumed and len(var) and not has_initial_values(layer):
            middle = float(np.median(var))
            changes.append((math.sqrt((middle + high) / (middle + low)) - 1, layer.name, middle))
    change, name, typical = max(changes, default=(0.0, "", 0.0))
    if change > _MIN_CHANGE:
        yield (
            f"{name} has variances of {typical:.1g}: eps between {low:g} and {high:g} changes its output by "
            f"{100 * change:.0f} %. State the eps of the training with eps= or --eps"
        )
