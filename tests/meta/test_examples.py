"""The scripts in examples/ run as they are, in a folder of the user's."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

LINES = {
    "find_a_gap": ["recalibrating brings accuracy 0.9", "% of the gap: staleness in bn", "warning BN401 bn1: "],
    "repair_a_checkpoint": ["the remedy is recalibrate", ", kept\n", "accuracy after: 0.9", "wrote digits-repaired.pt"],
    "fold_for_deployment": ["folded into conv1 (bn1)", "BN layers left: 0\n"],
    "federated_averaging": [
        "variance in bn1 over that of all data in one place: 1.000 to 1.000\n",
        "an average of the variances instead: 0.9",
    ],
    "train_with_the_layers": ["activation: None -> relu", "are unchanged: True", "accuracy with torch's layers: 0.9"],
}
FILES = {"repair_a_checkpoint": {"digits.pt", "digits-repaired.pt"}, "fold_for_deployment": {"digits-folded.pt2"}}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LINES, "digits_network"}


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize("name", LINES)
def test_an_example_runs_as_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    sys.modules.pop("digits_network", None)
    printed = capsys.readouterr().out
    for line in LINES[name]:
        assert line in printed
    assert {path.name for path in tmp_path.iterdir()} == FILES.get(name, set())
