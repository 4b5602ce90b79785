"""What every experiment is made of: settings, a pure run, claims, and a picture."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from bnlab.records import Figure

__all__ = ["Claim", "Experiment", "Observation", "Tick"]

Config = TypeVar("Config")

Tick = Callable[[float], None]
"""Called now and then with the share of a run that is done, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that a source says and a number decides.

    Attributes:
        key: Short name, unique in its experiment.
        text: The claim, a sentence without a final stop.
        source: Where it comes from.
        number: What is measured.
        unit: Its unit.
        low: Smallest value that agrees with the claim; -inf if there is none.
        high: Largest value that does; inf if there is none.
        tolerance: Why just that far.
        refuted_if: What would refute it.
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


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one run with one seed showed.

    Attributes:
        values: For each claim its number under each condition, in order; the condition is "" where there is only one.
        table: Columns of numbers or labels, all of one length, for the picture.
        notes: What else is worth knowing; the same for every seed.
    """

    values: Mapping[str, Mapping[str, float]]
    table: Mapping[str, Sequence[float | str]]
    notes: tuple[str, ...] = field(default=())


class Experiment(ABC, Generic[Config]):
    """An experiment. The first line of the docstring is its title.

    Attributes:
        name: What it is run by.
        source: The article, paper or thread it comes from.
        quick: Settings that take seconds to a few minutes on two cores; a frozen dataclass.
        full: Settings of the size of the source.
        claims: What it decides.
        data_dir: Folder with data sets that `resolve` and `run` search in the place of `$BNLAB_DATA`; None for that.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    quick: ClassVar[Any]
    full: ClassVar[Any]
    claims: ClassVar[tuple[Claim, ...]]
    data_dir: Path | None = None

    @property
    def title(self) -> str:
        """What it is about, a sentence."""
        return inspect.cleandoc(type(self).__doc__ or "").splitlines()[0]

    def resolve(self, config: Config) -> Config:
        """Return the settings with what is chosen by what is there, such as a data set, filled in."""
        return config

    @abstractmethod
    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Run once. The same settings and seed give the same observation."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return how the table is drawn.

        The columns of the y axis, or of the cells, are means over the seeds; "low" and "high" are then the smallest and
        the largest of them.
        """
