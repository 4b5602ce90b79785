"""What an experiment found: its claims with a verdict each, and the numbers and the picture behind them."""

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
    """What became of a claim. DEPENDS: it holds under some conditions, or for some seeds, and not for others."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    DEPENDS = "depends"


OUTCOMES = {True: "holds", False: "fails", None: "turns with the seed"}
"""What a claim does under a condition."""


@dataclass(frozen=True)
class Estimate:
    """One number under one condition, over the seeds.

    Attributes:
        condition: Such as "batch 8"; "" where there is only one.
        mean: Mean over the seeds.
        low: Lower end of the 95 % interval of the mean, by Student's t.
        high: Upper end.
        values: One for each seed.
        holds: Whether every seed is where the claim expects it; None where some are and some are not.
    """

    condition: str
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    holds: bool | None

    @property
    def outcome(self) -> str:
        """What the claim does under the condition, in words."""
        return OUTCOMES[self.holds]


@dataclass(frozen=True, kw_only=True)
class ClaimRecord:
    """One claim and its verdict.

    Attributes:
        key: Short name.
        text: The claim, a sentence.
        source: Where it comes from.
        number: What is measured.
        unit: Its unit.
        low: Smallest value that agrees with the claim.
        high: Largest value that does.
        tolerance: Why just that far.
        refuted_if: What would refute it.
        verdict: What became of it.
        boundary: Where it turns, if it depends.
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
        name: Of the column.
        numbers: Its values, if they are numbers.
        labels: Its values, if they are text.
    """

    name: str
    numbers: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None


class Mark(str, Enum):
    """How a row of the table is drawn."""

    LINE = "line"
    POINT = "point"
    BAR = "bar"
    CELL = "cell"


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        column: What it shows.
        title: What it says.
        log: Whether it is logarithmic.
    """

    column: str
    title: str
    log: bool = False


@dataclass(frozen=True)
class Rule:
    """A line at a value of x or y: where a claim turns, or what a paper says.

    Attributes:
        axis: "x" or "y".
        value: Where.
        label: What it is.
    """

    axis: str
    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How the table is drawn.

    Attributes:
        title: What the picture shows.
        mark: How a row is drawn; a line joins the rows of one series in the order of x.
        x: Horizontal axis.
        y: Vertical axis.
        series: Column that tells series apart by colour, dash and shape; None for one series.
        panel: Column with a panel for each value; None for one panel.
        value: Of cells: the axis of the colour.
        low: Column with the lower end of a band around a line.
        high: Column with the upper end.
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
    """Everything an experiment says; the attributes are the keys of its JSON form.

    Attributes:
        name: Of the experiment.
        title: What it is about, a sentence.
        source: The article, paper or thread it comes from.
        profile: "quick", "full", or "custom" where single settings were given.
        config: The settings, as text.
        key: Hash of the settings, the seeds and the code.
        seeds: What the runs began with.
        claims: Each with its verdict.
        table: The numbers behind the picture, column by column.
        figure: How they are drawn.
        versions: Of what it was run with, by package.
        seconds: How long it took; not part of what was found.
        notes: What else is worth knowing.
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
