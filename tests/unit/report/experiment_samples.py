from __future__ import annotations

import dataclasses

from bnlab.records import (
    Axis,
    ClaimRecord,
    Column,
    Estimate,
    ExperimentRecord,
    Figure,
    Mark,
    Rule,
    Verdict,
)

LINE = Figure(
    title="Ratio over the batch size",
    mark=Mark.LINE,
    x=Axis("batch", "batch size", log=True),
    y=Axis("ratio", "ratio"),
    rules=(Rule("y", 1.0, "equal"),),
)


CELLS = dataclasses.replace(
    LINE, mark=Mark.CELL, y=Axis("layer", "layer"), value=Axis("ratio", "ratio"), series=None, rules=()
)


def estimate(condition: str = "batch 2", mean: float = 0.5, holds: bool | None = True) -> Estimate:
    return Estimate(condition, mean, mean - 0.1, mean + 0.1, (mean,) * 3, holds)


def claim(**changes: object) -> ClaimRecord:
    record = ClaimRecord(
        key="bessel",
        text="the ratio is a half",
        source="a paper",
        number="ratio of the outputs",
        unit="ratio",
        low=0.4,
        high=0.6,
        tolerance="wide",
        refuted_if="it were not",
        verdict=Verdict.DEPENDS,
        boundary="holds up to batch 2, fails from batch 4",
        estimates=(estimate(), estimate("batch 4", 0.9, holds=False)),
    )
    return dataclasses.replace(record, **changes)


def experiment(**changes: object) -> ExperimentRecord:
    record = ExperimentRecord(
        bnlab="0.1.0",
        name="halving",
        title="A number is halved",
        source="this test",
        profile="quick",
        config={"batches": "(2, 4)"},
        key="abc",
        seeds=(0, 1, 2),
        claims=(claim(),),
        table=(
            Column("batch", numbers=(2.0, 4.0)),
            Column("layer", labels=("torch", "bnlab")),
            Column("ratio", numbers=(0.5, 0.9)),
        ),
        figure=LINE,
        versions={"torch": "2.13.0"},
        seconds=3.2,
        notes=("a note",),
    )
    return dataclasses.replace(record, **changes)
