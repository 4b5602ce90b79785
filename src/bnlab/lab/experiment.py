"""The parts of every experiment: settings, a pure run, claims, and a picture."""

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
"""A function that an experiment calls with the finished share of its run, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a source that a number decides.

    Attributes:
        key: A short name, unique in the experiment.
        text: The claim, a sentence without a final stop.
        source: Where the claim comes from.
        number: The measured number, in words.
        unit: The unit of the number.
        low: The smallest value that agrees with the claim; -inf if there is none.
        high: The largest value that agrees with the claim; inf if there is none.
        tolerance: The reason for these limits.
        refuted_if: What would refute the claim.
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
    """The measurements of one run with one seed.

    Attributes:
        values: The number of each claim under each condition, in order. A single condition is "".
        table: Columns of numbers or labels, all of the same length, for the picture.
        notes: Other facts that a reader should know. They are the same for every seed.
    """

    values: Mapping[str, Mapping[str, float]]
    table: Mapping[str, Sequence[float | str]]
    notes: tuple[str, ...] = field(default=())


class Experiment(ABC, Generic[Config]):
    """An experiment. The first line of the docstring is its title.

    Attributes:
        name: The name that runs the experiment.
        source: The paper, documentation page or thread of the claims.
        quick: The settings that take seconds to a few minutes on two cores; a frozen dataclass.
        full: The settings of the size of the source.
        claims: The claims that the experiment decides.
        data_dir: The folder with data sets that `resolve` and `run` search. None stands for `$BNLAB_DATA`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    quick: ClassVar[Any]
    full: ClassVar[Any]
    claims: ClassVar[tuple[Claim, ...]]
    data_dir: Path | None = None

    @property
    def title(self) -> str:
        """The topic of the experiment, a sentence."""
        return inspect.cleandoc(type(self).__doc__ or "").splitlines()[0]

    def resolve(self, config: Config) -> Config:
        """Return the settings, completed by those that depend on the machine, such as the data set."""
        return config

    @abstractmethod
    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Run once. The same settings and the same seed give the same observation."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return how to draw the table.

        The column of the y axis, or of the cells, holds means over the seeds. The columns "low" and "high" hold the
        smallest and the largest value of the seeds.
        """
