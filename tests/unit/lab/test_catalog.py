import inspect
from pathlib import Path

import pytest

import bnlab
from bnlab.errors import UsageError
from bnlab.lab.catalog import EXPERIMENTS, by_name
from bnlab.records import Figure


def test_every_file_of_an_experiment_is_listed_under_its_name():
    folder = Path(bnlab.__file__).parent / "lab" / "experiments"
    files = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    assert {Path(inspect.getfile(type(one))).stem for one in EXPERIMENTS} == files
    assert {one.name.replace("-", "_") for one in EXPERIMENTS} == files
    assert bnlab.lab.list() == [one.name for one in EXPERIMENTS]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
def test_an_experiment_says_what_it_decides_and_how_it_is_drawn(experiment):
    keys = [claim.key for claim in experiment.claims]
    assert len(keys) == len(set(keys)) > 0
    assert all(claim.low <= claim.high and not claim.text.endswith(".") for claim in experiment.claims)
    assert experiment.title.endswith(".")
    assert type(experiment.quick) is type(experiment.full)
    assert isinstance(experiment.figure(), Figure)


def test_by_name_takes_the_whole_name_alone():
    assert by_name("train-eval").name == "train-eval"
    with pytest.raises(
        UsageError, match=r"lab: name must be one of huge-gap, .*, got 'identity'\. Did you mean 'identities'\?"
    ):
        by_name("identity")
    with pytest.raises(UsageError) as error:
        by_name("zzz")
    assert str(error.value).endswith("got 'zzz'.")
