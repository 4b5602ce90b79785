"""Judges a claim by the numbers of every seed: its verdict, and the boundary where the verdict turns."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from bnlab.errors import UsageError
from bnlab.lab.experiment import Claim
from bnlab.records import ClaimRecord, Estimate, Verdict
from bnlab.wording import listed

__all__ = ["judge"]

_STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t by degrees of freedom, from 0. The last one is a safe value beyond 10."""

_MAX_CONDITIONS = 4
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def judge(claim: Claim, by_seed: Sequence[Mapping[str, float]]) -> ClaimRecord:
    """Return a claim with its verdict.

    Under a condition, a claim holds if the numbers of all seeds lie between `low` and `high`, and fails if none of them
    does. It is supported if it holds under every condition, refuted if it fails under every condition, and depends
    otherwise.

    Args:
        claim: The claim.
        by_seed: The number under each condition, for each seed.

    Raises:
        UsageError: If the seeds do not have the same conditions.
    """
    conditions = list(by_seed[0])
    if not conditions or any(list(values) != conditions for values in by_seed):
        raise UsageError(f"{claim.key}: every seed must give a number under the same conditions, got others.")
    estimates = tuple(
        _estimate(claim, condition, [values[condition] for values in by_seed]) for condition in conditions
    )
    outcomes = {estimate.holds for estimate in estimates}
    verdict = Verdict.SUPPORTED if outcomes == {True} else Verdict.REFUTED if outcomes == {False} else Verdict.DEPENDS
    boundary = _boundary(estimates) if verdict is Verdict.DEPENDS else None
    return ClaimRecord(**dataclasses.asdict(claim), verdict=verdict, boundary=boundary, estimates=estimates)


def _estimate(claim: Claim, condition: str, values: Sequence[float]) -> Estimate:
    inside = [claim.low <= value <= claim.high for value in values]
    holds = True if all(inside) else None if any(inside) else False
    count, mean = len(values), math.fsum(values) / len(values)
    if not math.isfinite(mean):
        return Estimate(condition, mean, min(values), max(values), tuple(values), holds)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1))
    half = 0.0 if spread == 0 else _STUDENT[min(count - 1, len(_STUDENT) - 1)] * spread / math.sqrt(count)
    return Estimate(condition, mean, mean - half, mean + half, tuple(values), holds)


def _boundary(estimates: Sequence[Estimate]) -> str:
    """Return where the claim holds and where it fails. On an ordered axis, return the conditions where it turns."""
    if len(estimates) == 1:
        (only,) = estimates
        return f"with the seed: {', '.join(f'{value:.3g}' for value in only.values)}"
    turns = [(left, right) for left, right in itertools.pairwise(estimates) if left.holds is not right.holds]
    if len(turns) == 1 and _are_ordered([estimate.condition for estimate in estimates]):
        left, right = turns[0]
        return f"{left.outcome} up to {left.condition}, {right.outcome} from {right.condition}"
    groups: dict[str, list[str]] = {}
    for estimate in estimates:
        groups.setdefault(estimate.outcome, []).append(estimate.condition)
    return " | ".join(
        f"{outcome}: {listed(conditions, _MAX_CONDITIONS, separator='; ')}" for outcome, conditions in groups.items()
    )


def _are_ordered(conditions: Sequence[str]) -> bool:
    """Whether the first numbers in the conditions strictly rise or strictly fall."""
    matches = [_NUMBER.search(condition) for condition in conditions]
    numbers = [float(match.group()) for match in matches if match is not None]
    steps = [right - left for left, right in itertools.pairwise(numbers)]
    whole = len(numbers) == len(conditions)
    return whole and (all(step > 0 for step in steps) or all(step < 0 for step in steps))
