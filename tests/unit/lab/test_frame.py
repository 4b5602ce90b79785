"""The frame of the lab: verdicts, records that are kept, and what a planted wrong implementation does to a verdict."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import jsonschema
import pytest
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.lab import Claim, Experiment, Observation
from bnlab.lab.verdict import judge
from bnlab.records import Axis, ExperimentRecord, Figure, Mark, Rule, Verdict, json_schema

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

    def figure(self, claims):
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


@pytest.mark.parametrize(
    ("by_seed", "verdict", "boundary"),
    [
        ([{"": 0.5}, {"": 0.55}], Verdict.SUPPORTED, None),
        ([{"": 0.7}, {"": 0.3}], Verdict.REFUTED, None),
        ([{"": 0.5}, {"": 0.7}], Verdict.DEPENDS, "with the seed: 0.5, 0.7"),
        ([{"1": 0.5, "2": 0.5, "3": 0.9}] * 3, Verdict.DEPENDS, "holds up to 2, fails from 3"),
        ([{"1": 0.5, "2": 0.9, "3": 0.5}] * 3, Verdict.DEPENDS, "holds: 1; 3 | fails: 2"),
        ([{"1": math.inf, "2": 0.5}] * 3, Verdict.DEPENDS, "fails up to 1, holds from 2"),
        ([{"": math.nan}] * 3, Verdict.REFUTED, None),
        ([{"torch": 0.5, "bnlab": 0.9}] * 3, Verdict.DEPENDS, "holds: torch | fails: bnlab"),
        ([{"p 0.9": 0.5, "p 0.5": 0.9}] * 3, Verdict.DEPENDS, "holds up to p 0.9, fails from p 0.5"),
        ([{"1": 0.5, "2": 0.5}, {"1": 0.5, "2": 0.9}], Verdict.DEPENDS, "holds up to 1, turns with the seed from 2"),
    ],
)
def test_verdicts(by_seed, verdict, boundary):
    record = judge(CLAIM, by_seed)
    assert record.verdict is verdict
    assert record.boundary == boundary


def test_the_interval_is_that_of_student():
    from scipy import stats

    values = [0.48, 0.5, 0.55, 0.51]
    (estimate,) = judge(CLAIM, [{"": value} for value in values]).estimates
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-3)


def test_seeds_with_other_conditions_are_refused():
    with pytest.raises(UsageError, match="halves: every seed must give a number under the same conditions"):
        judge(CLAIM, [{"1": 0.5}, {"2": 0.5}])


def test_a_record_has_everything_and_follows_its_schema():
    result = bnlab.lab.run(Halving())
    data = json.loads(result.dumps())
    jsonschema.validate(data, json_schema("bnlab.experiment/1"))
    assert ExperimentRecord.from_json(data).claims == result.claims
    assert (result.profile, result.seeds, result.notes) == ("quick", (0, 1, 2), ("a note",))
    table = {column.name: column.numbers or column.labels for column in result.table}
    assert table["kind"] == ("a", "b")
    assert table["ratio"] == pytest.approx((0.501, 0.501))
    assert (table["low"], table["high"]) == ((0.5, 0.5), (0.502, 0.502))
    assert "SUPPORTED  a number is halved" in str(result)
    assert repr(result) == "<Result of 'halving': halves supported>"


def test_a_record_that_is_there_is_not_computed_again(tmp_path):
    Halving.runs = 0
    first = bnlab.lab.run(Halving(), folder=tmp_path)
    assert Halving.runs == 3
    assert bnlab.lab.run(Halving(), folder=tmp_path) == first
    assert Halving.runs == 3
    bnlab.lab.run(Halving(), folder=tmp_path, again=True)
    assert Halving.runs == 6
    bnlab.lab.run(Halving(), folder=tmp_path, factor=0.55)
    bnlab.lab.run(Halving(), folder=tmp_path, seeds=4)
    bnlab.lab.run(Halving(), folder=tmp_path, full=True)
    assert Halving.runs == 16
    assert [record.profile for record in bnlab.lab.records(tmp_path)] == ["custom", "full", "quick", "quick"]


def test_the_same_settings_give_the_same_record_but_for_the_time():
    records = [bnlab.lab.run("train-eval", batches=(2, 4), updates=(1, 200)).to_json() for _ in range(2)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"schema": "bnlab.receipt/1"}')
    assert bnlab.lab.records(tmp_path) == []
    with pytest.raises(UsageError, match="folder must exist"):
        bnlab.lab.records(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiment": "train-evil"}, "Did you mean 'train-eval'?"),
        ({"experiment": Halving(), "seeds": 2}, "halving: seeds must be at least 3 for a verdict, got 2"),
        ({"experiment": Halving(), "speed": 2}, "halving: setting must be one of factor, got 'speed'"),
        ({"experiment": Halving(), "data_dir": "nowhere"}, "halving: data_dir must be a folder, got nowhere"),
    ],
)
def test_what_cannot_be_run(arguments, message):
    with pytest.raises(UsageError) as error:
        bnlab.lab.run(**arguments)
    assert message in str(error.value)


def test_pictures_are_drawn_from_the_record_alone():
    from bnlab.report import figure

    result = bnlab.lab.run(Halving())
    record = ExperimentRecord.from_json(result.to_json())
    assert figure.svg(record).startswith("<svg")
    assert "half" in figure.svg(record)
    assert figure.png(record)[:4] == b"\x89PNG"
    page = figure.html(record)
    assert "</html>" in page
    assert 'src="http' not in page
    assert "<svg" in result._repr_html_()


@pytest.mark.parametrize("mark", list(Mark))
@pytest.mark.parametrize("panel", [None, "kind"])
def test_every_kind_of_picture(mark, panel):
    import dataclasses

    from bnlab.report import figure

    result = bnlab.lab.run(Halving())
    drawn = dataclasses.replace(result.figure, mark=mark, panel=panel, low=None, high=None)
    drawn = dataclasses.replace(drawn, value=Axis("ratio", "ratio"), rules=()) if mark is Mark.CELL else drawn
    assert figure.svg(dataclasses.replace(result, figure=drawn)).startswith("<svg")


def test_drawing_without_the_packages_is_one_line(monkeypatch):
    from bnlab.errors import MissingPackage
    from bnlab.report import figure

    monkeypatch.setattr(figure, "can_draw", lambda: False)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[report\]'"):
        figure.svg(bnlab.lab.run(Halving()))


class StoringBiased(nn.BatchNorm1d):
    """BN that stores what it normalises with: the biased variance."""

    def forward(self, input):
        before = self.running_var.clone()
        output = super().forward(input)
        if self.training:
            new = (self.running_var - (1 - self.momentum) * before) / self.momentum
            biased = new * (len(input) - 1) / len(input)
            self.running_var.copy_((1 - self.momentum) * before + self.momentum * biased)
        return output


class Unbiased(nn.BatchNorm1d):
    """BN whose momentum leaves a trace for ever: it forgets nothing beyond a tenth."""

    def forward(self, input):
        output = super().forward(input)
        return output if self.training else output * (1 + self.momentum)


def test_a_wrong_implementation_flips_the_verdicts_of_train_eval(monkeypatch):
    def verdicts():
        result = bnlab.lab.run("train-eval", batches=(2, 4), updates=(1, 1000), momenta=(0.1, 0.5))
        return {claim.key: claim.verdict.value for claim in result.claims}

    assert verdicts() == {"differs": "supported", "bessel": "supported", "momentum": "refuted"}
    monkeypatch.setattr("bnlab.lab.experiments.train_eval.nn.BatchNorm1d", StoringBiased)
    assert verdicts() == {"differs": "refuted", "bessel": "refuted", "momentum": "refuted"}
    monkeypatch.setattr("bnlab.lab.experiments.train_eval.nn.BatchNorm1d", Unbiased)
    assert verdicts()["momentum"] == "supported"
