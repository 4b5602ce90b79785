from bnlab.records import (
    ClaimRecord,
    Column,
    Estimate,
    ExperimentRecord,
    Figure,
    Mark,
    Verdict,
)
from bnlab.records.experiment import Axis
from bnlab.report.text import experiment

HOSTILE = "\x1b[31mred\x07\n\u202e[bold]é[/bold]"


def record(text="the eval output is larger", seeds=(0, 1, 2)):
    estimates = tuple(Estimate(f"batch {2**i}", 1.0, 0.5, 1.5, (1.0,), holds=i < 6) for i in range(12))
    claim = ClaimRecord(
        key="larger", text=text, source="here", number="ratio", unit="1", low=1.0, high=float("inf"),
        tolerance="none", refuted_if="it is not", verdict=Verdict.DEPENDS, boundary="turns at batch 64",
        estimates=estimates,
    )  # fmt: skip
    return ExperimentRecord(
        bnlab="0.1.0", name="train-eval", title="What eval mode does", source="an article", profile="quick", config={},
        key="k", seeds=seeds, claims=(claim,), table=(Column("x", (1.0,)),), versions={}, seconds=3.0, notes=(text,),
        figure=Figure(title="t", mark=Mark.LINE, x=Axis("x", "x"), y=Axis("x", "x")),
    )  # fmt: skip


def test_an_experiment_ends_in_verdicts():
    assert experiment.render(record(), width=80).splitlines() == [
        "train-eval  What eval mode does",
        "an article (quick, seeds 0 to 2, 3 s)",
        "",
        "DEPENDS  the eval output is larger",
        "  turns at batch 64",
        "  ratio: must be >= 1 1",
        "    batch 1: 1 [0.5, 1.5] holds",
        "    batch 32: 1 [0.5, 1.5] holds",
        "    batch 64: 1 [0.5, 1.5] fails",
        "    batch 2048: 1 [0.5, 1.5] fails",
        "    ... and 8 more in the record",
        "",
        "the eval output is larger",
    ]


def test_an_experiment_cannot_reach_the_terminal_or_the_markup():
    for encoding in ("utf-8", "ascii"):
        text = experiment.render(record(HOSTILE, seeds=()), width=80, encoding=encoding)
        assert not set(text) & set("\x1b\x07\u202e")
        assert "no seeds" in text
        text.encode(encoding)
