"""Finds the verdicts that hang on an assumption: a check that is silent with it, and would fire without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bnlab.checks.bn105_statistics_barely_updated import StatisticsBarelyUpdated
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import NetworkState
from bnlab.records import Finding

__all__ = ["assumption_behind"]

_SMALLEST_MOMENTUM = 0.001
"""The smallest momentum that trainings use."""


def assumption_behind(settings: Settings, networks: Iterable[NetworkState], findings: Sequence[Finding]) -> str | None:
    """Return how the verdict on the age of the statistics hangs on the assumed momentum; None where it does not.

    After k updates with momentum a, the initial variance 1 has the weight (1 - a)^k, so that a running variance below
    this weight proves that the momentum is not so small.

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
    limit = check.limits.initial_weight
    bounds = {
        1 - limit ** (1 / layer.num_batches_tracked): layer.hyperparameters.momentum
        for network in networks
        for layer in network.layers
        if "momentum" in layer.hyperparameters.assumed and layer.num_batches_tracked and check.lacks(layer) is None
        if (layer.running_var >= limit).all() and (layer.running_mean != 0).any()
    }
    bound = max(bounds, default=0.0)
    if bound < _SMALLEST_MOMENTUM:
        return None
    return f"{check.code} would fire at a momentum below {bound:.3g} ({bounds[bound]:.3g} is assumed)"
