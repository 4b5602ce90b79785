"""The records of an action on a model."""

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

    EXACT: the output stays the same within a stated tolerance. STATISTICS: the change affects running statistics, their
    counters and momentum only. BEHAVIOUR: the model computes something else. MANUAL: the remedy is advice, and nothing
    is applied.
    """

    EXACT = "exact"
    STATISTICS = "statistics"
    BEHAVIOUR = "behaviour"
    MANUAL = "manual"


REMEDIES: Mapping[str, Safety] = {
    "recalibrate": Safety.STATISTICS,
    "set-momentum": Safety.STATISTICS,
    "set-eps": Safety.BEHAVIOUR,
    "drop-bias": Safety.EXACT,
    "freeze": Safety.BEHAVIOUR,
    "fold": Safety.EXACT,
    "manual": Safety.MANUAL,
}
"""Every remedy that a finding may name, with its safety."""


@dataclass(frozen=True)
class Change:
    """One change in one layer, with the value before and after. `what` is an attribute, or "class"."""

    layer: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftAlone:
    """A layer that the action did not change, and the reason."""

    layer: str
    reason: str


@dataclass(frozen=True)
class MetricChange:
    """The metric before and after the action; higher is better."""

    before: float
    after: float


@dataclass(frozen=True)
class Measurement:
    """A number that an action measured to prove its result.

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
    """The gap of a layer between train mode and eval mode, by cause as in `LayerRecord.gap`; None if not measured."""

    layer: str
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """The results of the checks before and after a repair.

    Attributes:
        before: Counts of findings before the repair.
        after: Counts of findings after the repair.
        resolved: "CODE layer" of each finding that is gone.
        remaining: "CODE layer" of each finding that is still there.
        appeared: "CODE layer" of each finding that is new.
        conclusion_before: The conclusion before the repair, one sentence; "" in an old record.
        conclusion_after: The conclusion after the repair.
        numbers_before: The metric under four choices of data and statistics, before the repair; None without a metric.
        numbers_after: The same numbers after the repair.
        gaps: The layers in execution order, with the gap between train mode and eval mode before and after.
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
    """What an action did to a model. The attributes are the keys of the JSON form.

    Attributes:
        action: The action, such as "convert".
        safety: What the action may do to the output.
        changes: All changes, layer by layer.
        left_alone: Layers that the caller selected and the action did not change.
        metric: The metric before and after; None without a metric.
        kept: Whether the changes stand; False if they were taken back because the metric got worse.
        notes: Further remarks.
        measurements: Numbers that prove the action, or show how far to trust it.
        recheck: The results of the checks before and after a repair.
        planned: Whether this is only a plan and nothing has been changed.
        target: The model or file that the action worked on, if it has a name.
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
