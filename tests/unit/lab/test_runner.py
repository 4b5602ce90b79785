import inspect
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tests.unit.lab.datasets.data_files import idx, mnist_images, write_mnist
from tests.unit.lab.halving import Halving

import bnlab
from bnlab.errors import UsageError
from bnlab.lab import Observation, datasets, runner
from bnlab.lab.experiments.train_eval import TrainEval
from bnlab.records import ExperimentRecord, json_schema


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


def test_the_same_settings_give_the_same_record_but_for_the_time():
    records = [bnlab.lab.run("train-eval", batches=(2, 4), updates=(1, 200)).to_json() for _ in range(2)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]


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


@dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


class Digits(Halving):
    """Says which images it was run on."""

    name = "digits-of-a-folder"
    quick = full = NoSettings()

    def __init__(self, together=None):
        self.together, self.seen = together, []

    def run(self, config, seed, tick):
        if self.together is not None:
            self.together.wait(timeout=60)
        self.seen.append(dict(os.environ))
        _, labels = datasets.load("mnist", folder=self.data_dir)[0]
        return Observation(values={"halves": {"": float(labels[0])}}, table={"n": [1], "kind": ["a"], "ratio": [0.5]})


def label_of(folder, label):
    write_mnist(folder, images=idx(mnist_images(1), 2051), labels=idx(np.array([label], np.uint8), 2049))
    return folder


def label_seen(record):
    return record.claims[0].estimates[0].mean


def test_the_folder_with_data_sets_reaches_the_run_and_the_environment_stays(folder):
    label_of(folder, 3)
    before = dict(os.environ)
    experiment = Digits()
    assert label_seen(bnlab.lab.run(experiment, data_dir=label_of(folder.parent / "other", 7))) == 7
    assert experiment.seen == [before] * 3
    assert dict(os.environ) == before
    assert label_seen(bnlab.lab.run(experiment)) == 3  # $BNLAB_DATA
    assert experiment.data_dir is None


def test_two_runs_at_once_read_each_from_its_own_folder(folder):
    before = dict(os.environ)
    together = threading.Barrier(2)
    folders = {label: label_of(folder.parent / f"of {label}", label) for label in (2, 8)}
    with ThreadPoolExecutor(2) as pool:
        runs = {label: pool.submit(bnlab.lab.run, Digits(together), data_dir=place) for label, place in folders.items()}
        assert {label: label_seen(run.result()) for label, run in runs.items()} == {2: 2, 8: 8}
    assert dict(os.environ) == before


def test_nothing_in_the_package_writes_the_environment():
    package = Path(bnlab.__file__).parent
    written = [path for path in package.rglob("*.py") if _WRITES.search(path.read_text(encoding="utf-8"))]
    assert written == []


_WRITES = re.compile(
    r"environ\[[^]]*\] *=[^=]|environ\.(pop|update|setdefault|clear)|del os\.environ|putenv|unsetenv|environ *\|="
)


@pytest.mark.parametrize(
    "text", ['os.environ["A"] = "b"', 'os.environ.pop("A")', "del os.environ['A']", "os.putenv(a, b)"]
)
def test_a_write_to_the_environment_would_be_noticed(text):
    assert _WRITES.search(text)
    assert not _WRITES.search('if os.environ.get("A") == "b" or os.environ["A"] == "c":')


def test_a_record_depends_on_the_code_of_its_experiment_and_of_the_lab_but_on_no_other_experiment():
    lab = Path(bnlab.__file__).parent / "lab"
    sources = set(runner._sources(TrainEval()))
    assert {lab / "experiments" / "train_eval.py", lab / "verdict.py", lab / "datasets" / "mnist.py"} <= sources
    assert lab.parent / "functional" / "moments.py" in sources
    assert {path.name for path in sources if path.parent == lab / "experiments"} == {"train_eval.py"}
    assert Path(inspect.getfile(Halving)) in runner._sources(Halving())


def test_an_experiment_may_be_defined_where_there_is_no_file():
    """At a prompt and in a notebook, a class has no source file."""
    program = (
        "from dataclasses import dataclass\n"
        "from bnlab.lab import Experiment, Observation\n"
        "from bnlab.lab.runner import _code_of\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    factor: float = 2.0\n"
        "class Mine(Experiment[Config]):\n"
        "    name, source, quick, full, claims = 'mine', 'here', Config(), Config(), ()\n"
        "    def run(self, config, seed, tick):\n"
        "        return Observation(values={}, table={'x': [config.factor]})\n"
        "    def figure(self):\n"
        "        raise NotImplementedError\n"
        "class Other(Mine):\n"
        "    def run(self, config, seed, tick):\n"
        "        return Observation(values={}, table={'x': [3.0]})\n"
        "assert _code_of(Mine()) == _code_of(Mine()) != _code_of(Other())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
