"""The settings of a diagnosis, validated before anything is read or run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from bnlab import checks
from bnlab.checks import AnyCheck
from bnlab.errors import UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.wording import did_you_mean

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings of a diagnosis, validated once and used for any number of targets.

    Attributes:
        checks: The checks to run, each with its limits.
        ignore: Maps codes to reasons, for checks whose findings are dropped.
        hyperparameters: Momentum and eps, as far as the caller states them.
        per_channel: Whether the layer records hold a value for each channel, which pictures need.
        infers_eps: Whether eps is to be inferred from training data.
    """

    checks: tuple[AnyCheck[Any, Any, Any], ...]
    ignore: Mapping[str, str]
    hyperparameters: Hyperparameters
    per_channel: bool = False
    infers_eps: bool = False

    @classmethod
    def of(
        cls,
        *,
        select: Sequence[str] | None = None,
        ignore: Mapping[str, str] | None = None,
        limits: Mapping[str, Mapping[str, float]] | None = None,
        momentum: float | Literal["assumed"] | None = "assumed",
        eps: float | Literal["assumed", "infer"] = "assumed",
        per_channel: bool = False,
    ) -> Settings:
        """Validate the arguments of :func:`check`.

        Raises:
            UsageError: If an argument is invalid.
        """
        changed = _by_code("limits", limits)
        reasons = _by_code("ignore", ignore)
        for code, reason in reasons.items():
            if not (isinstance(reason, str) and reason.strip()):
                raise UsageError(f"ignore: reason for {code} must be a text, got {reason!r}. Say why it is accepted.")
        return cls(
            tuple(_with_limits(check, changed.get(check.code, {})) for check in checks.select(select)),
            reasons,
            _hyperparameters(momentum, "assumed" if eps == "infer" else eps),
            per_channel,
            infers_eps=eps == "infer",
        )


def _by_code(argument: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise UsageError(f"{argument}: value must be a mapping by code, got {type(values).__name__}.")
    return {checks.by_code(code).code: value for code, value in (values or {}).items()}


def _with_limits(check: AnyCheck[Any, Any, Any], changed: Mapping[str, float]) -> AnyCheck[Any, Any, Any]:
    known = [field.name for field in dataclasses.fields(check.limits)]
    if not isinstance(changed, Mapping):
        raise UsageError(f"limits: value for {check.code} must be a mapping by name, got {changed!r}.")
    for name, value in changed.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"limits: name for {check.code} must be one of {known}, got {name!r}.{hint}")
        if not _is_number(value) or math.isnan(value):
            raise UsageError(f"limits: {name} of {check.code} must be a number, got {value!r}.")
    return check.with_limits(**changed) if changed else check


def _hyperparameters(momentum: float | str | None, eps: float | str) -> Hyperparameters:
    stated: dict[str, float | None] = {}
    if momentum == "infer":
        raise UsageError(
            "momentum: value must be in [0, 1] or None, got 'infer'. Running statistics do not show it. They only "
            "bound it: a variance that began at 1 cannot be below (1 - momentum)^num_batches_tracked."
        )
    if momentum != "assumed":
        if momentum is not None and not (_is_number(momentum) and 0 <= momentum <= 1):
            raise UsageError(f"momentum: value must be in [0, 1] or None, got {momentum!r}.")
        stated["momentum"] = momentum
    if eps != "assumed":
        if not (_is_number(eps) and 0 <= eps < math.inf):
            raise UsageError(f"eps: value must be finite and >= 0, got {eps!r}.")
        stated["eps"] = eps
    return Hyperparameters().stating(**stated)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
