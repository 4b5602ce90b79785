"""Events of a training run, and the warnings that report them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from bnlab.checks import RunCheck
from bnlab.errors import BnlabWarning
from bnlab.records import Finding, Level
from bnlab.wording import counted, enumerated

__all__ = ["Event", "event_of", "warn"]

_MAX_NAMES = 3


@dataclass(frozen=True)
class Event:
    """A mishap of one layer in a training run.

    Attributes:
        code: Code of the check, such as "BN605". `bnlab.explain(code)` says what it means.
        name: Name of the check, such as "TrainedInEvalMode".
        level: How severe it is.
        layer: Layer path.
        step: Number of optimizer steps before it happened.
        message: The measurement against its limit.
        finding: The whole finding, as the report has it.
    """

    code: str
    name: str
    level: Level
    layer: str
    step: int
    message: str
    finding: Finding = field(repr=False)


def event_of(check: RunCheck[Any], finding: Finding) -> Event:
    """Return the event that a finding of a check is."""
    return Event(
        code=finding.code,
        name=check.name,
        level=finding.level,
        layer=finding.layer or "",
        step=int(finding.measured["step"].value),
        message=finding.message,
        finding=finding,
    )


def warn(events: Sequence[Event], stacklevel: int) -> None:
    """Issue one warning for all events of a kind that happened at the same step."""
    for (code, step), group in groupby(events, key=lambda event: (event.code, event.step)):
        same = list(group)
        first = same[0]
        layers = enumerated([event.layer or "the model" for event in same], _MAX_NAMES)
        where = layers if len(same) == 1 else f"{counted(len(same), 'layer')} ({layers})"
        warnings.warn(
            f"{code} {first.name}, step {step}, {where}: {first.message}. bnlab.explain({code!r}) says what helps.",
            BnlabWarning,
            stacklevel=stacklevel + 1,
        )
