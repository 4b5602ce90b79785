"""The options that the callbacks of all frameworks have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from bnlab.errors import UsageError
from bnlab.integrations.averaged import Policy
from bnlab.observe.passes.calling import Forward
from bnlab.observe.passes.kept_batches import is_count, require_data
from bnlab.remedies.recalibrate import RecalibrationSettings
from bnlab.watching.logs import LogTarget, log_of

__all__ = ["DEFAULT_BATCHES", "Moment", "Options"]

Moment: TypeAlias = Literal["validation", "save"]
"""What statistics are recalibrated before: a validation, or a checkpoint that is saved."""

DEFAULT_BATCHES = 64
"""Number of training batches that a recalibration reads where nothing else is chosen."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The validated options of a callback.

    Attributes:
        every: Number of steps from one sample of the statistics to the next.
        log: Where values and events go: "auto" for the logger of the framework, or a `log` of `bnlab.watch`.
        recalibrate_before: What the running statistics are recalibrated before; they are restored after it.
        averaged: What an averaged model gets then.
        batches: The data of a recalibration; None for those that the framework trains on.
        settings: How a recalibration runs.
    """

    every: int
    log: LogTarget
    recalibrate_before: frozenset[Moment]
    averaged: Policy
    batches: Any
    settings: RecalibrationSettings

    @classmethod
    def of(
        cls,
        *,
        every: int,
        log: LogTarget,
        recalibrate_before: Moment | Collection[Moment] | None,
        averaged: Policy,
        batches: Any,  # noqa: ANN401 - data
        max_batches: int | None,
        standard_error: float | None,
        forward: Forward | None,
    ) -> Options:
        """Validate the arguments of a callback.

        Raises:
            UsageError: If one of them is invalid.
        """
        if not is_count(every):
            raise UsageError(f"BnlabCallback: every must be a whole number >= 1, got {every!r}.")
        if log != "auto":
            log_of(log)
        return cls(
            every=every,
            log=log,
            recalibrate_before=_moments(recalibrate_before),
            averaged=require_policy("BnlabCallback", averaged),
            batches=None if batches is None else require_data("batches", batches),
            settings=settings_of(max_batches, standard_error, forward),
        )


def settings_of(
    max_batches: int | None, standard_error: float | None, forward: Forward | None
) -> RecalibrationSettings:
    """Return how to recalibrate. The counters follow those of a recalibration that lasts.

    Raises:
        UsageError: If an argument is invalid.
    """
    return RecalibrationSettings.of(
        "population",
        layerwise=False,
        max_batches=max_batches,
        standard_error=standard_error,
        keep_counters=False,
        forward=forward,
    )


def require_policy(subject: str, averaged: object) -> Policy:
    """Return what an averaged model gets.

    Raises:
        UsageError: If it is none of the policies.
    """
    if averaged not in get_args(Policy):
        raise UsageError(f"{subject}: averaged must be one of {_quoted(get_args(Policy))}, got {averaged!r}.")
    return averaged  # type: ignore[return-value] # one of its values


def _moments(value: Moment | Collection[Moment] | None) -> frozenset[Moment]:
    moments = frozenset([value] if isinstance(value, str) else value or ())
    if not moments <= {*get_args(Moment)}:
        raise UsageError(
            f"BnlabCallback: recalibrate_before must be {_quoted(get_args(Moment))}, a tuple of both or None, "
            f"got {value!r}."
        )
    return moments


def _quoted(names: Collection[str]) -> str:
    return " or ".join(map(repr, names))
