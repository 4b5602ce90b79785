"""The records of an experiment: its claims, each with a verdict, and the numbers and the picture behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from bnlab.records.document import Document

__all__ = [
    "OUTCOMES",
    "Axis",
    "ClaimRecord",
    "Column",
    "Estimate",
    "ExperimentRecord",
    "Figure",
    "Mark",
    "Rule",
    "Verdict",
]


class Verdict(str, Enum):
    """The verdict on a claim. DEPENDS: the claim holds under some conditions, or for some seeds, and not for others."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    DEPENDS = "depends"


OUTCOMES = {True: "holds", False: "fails", None: "turns with the seed"}
"""The outcome of a claim under one condition, in words; None: seeds disagree."""


@dataclass(frozen=True)
class Estimate:
    """One number under one condition, measured over the seeds.

    Attributes:
        condition: The condition, such as "batch 8"; "" if there is only one.
        mean: Mean over the seeds.
        low: Lower end of the 95 % interval of the mean, by Student's t.
        high: Upper end of that interval.
        values: The number for each seed.
        holds: True if the claim holds for every seed, False if for none, None if the seeds disagree.
    """

    condition: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    holds: bool | None

    @property
    def outcome(self) -> str:
        """The outcome of the claim under the condition, in words."""
        return OUTCOMES[self.holds]


@dataclass(frozen=True, kw_only=True)
class ClaimRecord:
    """One claim and its verdict.

    Attributes:
        key: Short name of the claim.
        text: The claim, a sentence.
        source: Where the claim comes from.
        number: The measured number, in words.
        unit: Unit of the number.
        low: Smallest value that agrees with the claim.
        high: Largest value that agrees with the claim.
        tolerance: The reason for these limits.
        refuted_if: What would refute the claim.
        verdict: The verdict on the claim.
        boundary: The condition at which the outcome changes, if the verdict is DEPENDS.
        estimates: The number under each condition.
    """

    key: str
    text: str
    source: str
    number: str
    unit: str
    low: float
    high: float
    tolerance: str
    refuted_if: str
    verdict: Verdict
    boundary: str | None
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class Column:
    """One column of the table behind the picture: numbers or labels.

    Attributes:
        name: Name of the column.
        numbers: The values, if they are numbers.
        labels: The values, if they are text.
    """

    name: str
    numbers: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None


class Mark(str, Enum):
    """The mark that draws a row of the table."""

    LINE = "line"
    POINT = "point"
    BAR = "bar"
    CELL = "cell"


@dataclass(frozen=True)
class Axis:
    """One axis of a figure.

    Attributes:
        column: The column that the axis shows.
        title: The title of the axis.
        log: Whether the axis is logarithmic.
    """

    column: str
    title: str
    log: bool = False


@dataclass(frozen=True)
class Rule:
    """A line at a value of x or y, such as the limit of a claim or the value in a paper.

    Attributes:
        axis: "x" or "y".
        value: Position on that axis.
        label: What the line stands for.
    """

    axis: str
    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How the table is drawn.

    Attributes:
        title: What the picture shows.
        mark: The mark that draws a row; a line joins the rows of one series in the order of x.
        x: Horizontal axis.
        y: Vertical axis.
        series: Column whose values are drawn as series of different colour, dash and shape; None for one series.
        panel: Column with a panel for each value; None for one panel.
        value: For cells, the axis of the colour.
        low: Column with the lower end of a band around a line.
        high: Column with the upper end of that band.
        rules: Lines that mark boundaries.
    """

    title: str
    mark: Mark
    x: Axis
    y: Axis
    series: str | None = None
    panel: str | None = None
    value: Axis | None = None
    low: str | None = None
    high: str | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord(Document):
    """A whole experiment. The attributes are the keys of its JSON form.

    Attributes:
        name: Name of the experiment.
        title: The subject of the experiment, a sentence.
        source: The paper, page or thread that makes the claims.
        profile: "quick" or "full"; "custom" if single settings were changed.
        config: The settings, as text.
        key: Hash of the settings, the seeds and the code.
        seeds: The random seed of each run.
        claims: The claims, each with its verdict.
        table: The numbers behind the picture, column by column.
        figure: How the table is drawn.
        versions: Versions of the packages that ran it, by name.
        seconds: Running time in seconds; not part of the result.
        notes: Further remarks.
    """

    schema: str = "bnlab.experiment/1"
    bnlab: str
    name: str
    title: str
    source: str
    profile: str
    config: Mapping[str, str]
    key: str
    seeds: tuple[int, ...]
    claims: tuple[ClaimRecord, ...]
    table: tuple[Column, ...]
    figure: Figure
    versions: Mapping[str, str]
    seconds: float
    notes: tuple[str, ...] = ()
