"""What an action did to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from bnlab.records.diagnosis import Numbers, Summary, Target
from bnlab.records.document import Document

__all__ = [
    "REMEDIES",
    "Change",
    "Changes",
    "GapChange",
    "LeftAlone",
    "Measurement",
    "MetricChange",
    "Recheck",
    "Safety",
]


class Safety(str, Enum):
    """What a change may do to the output of a model.

    EXACT: nothing beyond a stated tolerance. STATISTICS: it changes buffers only. BEHAVIOUR: the model computes
    something else. MANUAL: advice, nothing is applied.
    """

    EXACT = "exact"
    STATISTICS = "statistics"
    BEHAVIOUR = "behaviour"
    MANUAL = "manual"


REMEDIES: Mapping[str, Safety] = {
    "recalibrate": Safety.STATISTICS,
    "set-momentum": Safety.STATISTICS,
    "drop-bias": Safety.EXACT,
    "freeze": Safety.BEHAVIOUR,
    "fold": Safety.EXACT,
    "manual": Safety.MANUAL,
}
"""Every remedy a finding may name, and what it may do."""


@dataclass(frozen=True)
class Change:
    """One thing that became another in one layer: `what` is an attribute, or "class"."""

    layer: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftAlone:
    """A layer that was looked at and not changed, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class MetricChange:
    """The metric before and after, higher is better."""

    before: float
    after: float


@dataclass(frozen=True)
class Measurement:
    """A number that an action measured to prove itself.

    Attributes:
        layer: The layer, or the pair "conv1 + bn1"; None for the whole model.
        what: What was measured, such as "standard error of the mean".
        value: The number.
        unit: Its unit, such as "std".
    """

    layer: str | None
    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class GapChange:
    """The gap of a layer between the modes, by cause as in `LayerRecord.gap`; None where it was not measured."""

    layer: str
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """What the checks say after a repair, beside what they said before.

    Attributes:
        before: Counts of findings before.
        after: Counts of findings after.
        resolved: "CODE layer" of each finding that is gone.
        remaining: "CODE layer" of each finding that is still there.
        appeared: "CODE layer" of each finding that is new.
        conclusion_before: The conclusion before, one sentence; "" in an old record.
        conclusion_after: The conclusion after.
        numbers_before: The metric under four choices of data and statistics; None without a metric.
        numbers_after: The same after.
        gaps: The layers in execution order, with the gap between the modes before and after.
    """

    before: Summary
    after: Summary
    resolved: tuple[str, ...]
    remaining: tuple[str, ...]
    appeared: tuple[str, ...]
    conclusion_before: str = ""
    conclusion_after: str = ""
    numbers_before: Numbers | None = None
    numbers_after: Numbers | None = None
    gaps: tuple[GapChange, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Changes(Document):
    """What an action did to a model; the attributes are the keys of the JSON form.

    Attributes:
        action: What was asked for, such as "convert".
        safety: What it may do to the output.
        changes: Everything that is different now, layer after layer.
        left_alone: Layers that were asked for and not changed.
        metric: The metric before and after, where one was given.
        kept: Whether the changes stand; False if they were taken back because the metric got worse.
        notes: What else is worth knowing.
        measurements: Numbers that prove the action, or say how far to trust it.
        recheck: What the checks say after a repair.
        planned: Whether this is only a plan: nothing was changed.
        target: What was acted on, where it has a name.
    """

    schema: str = "bnlab.receipt/1"
    bnlab: str
    action: str
    safety: Safety
    changes: tuple[Change, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    metric: MetricChange | None = None
    kept: bool = True
    notes: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    recheck: Recheck | None = None
    planned: bool = False
    target: Target | None = None
