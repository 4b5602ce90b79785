"""`bnlab lab`: list and run."""

from __future__ import annotations

import json

import pytest

import bnlab


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A train-eval that takes no time, in an empty folder."""
    from bnlab.lab.train_eval import Config, TrainEval

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainEval, "quick", Config(batches=(2, 4), updates=(1, 200), momenta=(0.1, 0.5)))
    return tmp_path


def test_list_names_every_experiment_and_its_claims(bnlab_command):
    code, out, err = bnlab_command("lab", "list")
    assert (code, err) == (0, "")
    for name in bnlab.lab.list():
        assert f"{name} " in out
    assert "momentum is the cause of the difference that stays" in out


def test_run_shows_claims_and_verdicts_and_keeps_the_record(small, bnlab_command):
    code, out, err = bnlab_command("lab", "run", "train-eval")
    assert (code, err) == (0, "")
    assert "REFUTED  momentum is the cause of the difference that stays" in out
    (path,) = (small / "lab-records").glob("*.json")
    assert json.loads(path.read_text())["schema"] == "bnlab.experiment/1"
    before = path.stat().st_mtime_ns
    assert bnlab_command("lab", "run", "train-eval")[1] == out
    assert path.stat().st_mtime_ns == before
    bnlab_command("lab", "run", "train-eval", "--again")
    assert path.stat().st_mtime_ns != before


def test_run_as_json_lines_with_a_picture(small, bnlab_command):
    code, out, err = bnlab_command(
        "lab", "run", "train-eval", "--format", "json", "--figure", "svg", "--folder", "kept"
    )
    assert code == 0
    assert err.strip() == "drawn: kept/train-eval-quick.svg"
    (line,) = out.splitlines()
    assert json.loads(line)["name"] == "train-eval"
    assert (small / "kept" / "train-eval-quick.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "error: lab: name must be one of "),
        (("train-eval", "--seeds", "1"), "error: train-eval: seeds must be at least 3 for a verdict, got 1.\n"),
        (("train-eval", "--data-dir", "nowhere"), "error: train-eval: data_dir must be a folder, got nowhere.\n"),
        (("train-eval", "--folder", "a-file"), "error: a-file: folder must be writable, got: file exists.\n"),
    ],
)
def test_what_cannot_be_run_is_one_line(small, bnlab_command, arguments, message):
    (small / "a-file").write_text("")
    code, out, err = bnlab_command("lab", "run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
