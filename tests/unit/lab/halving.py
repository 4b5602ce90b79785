"""A small experiment whose verdict depends on a setting."""

from __future__ import annotations

from dataclasses import dataclass

from bnlab.lab import Claim, Experiment, Observation
from bnlab.records import Axis, Figure, Mark, Rule

CLAIM = Claim(
    key="halves",
    text="a number is halved",
    source="this test",
    number="ratio",
    unit="ratio",
    low=0.4,
    high=0.6,
    tolerance="wide",
    refuted_if="it were not",
)


@dataclass(frozen=True)
class Config:
    """Settings."""

    factor: float = 0.5


class Halving(Experiment[Config]):
    """A number is halved."""

    name = "halving"
    source = "this test"
    quick = Config()
    full = Config(factor=0.45)
    claims = (CLAIM,)
    runs = 0

    def run(self, config, seed, tick):
        type(self).runs += 1
        tick(0.5)
        values = {f"{n}": config.factor + seed / 1000 for n in (1, 2)}
        return Observation(
            values={"halves": values},
            table={"n": [1, 2], "kind": ["a", "b"], "ratio": list(values.values())},
            notes=("a note",),
        )

    def figure(self):
        return Figure(
            title="Halving",
            mark=Mark.LINE,
            x=Axis("n", "n", log=True),
            y=Axis("ratio", "ratio"),
            series="kind",
            low="low",
            high="high",
            rules=(Rule("y", 0.5, "half"), Rule("x", 1.5, "there")),
        )
