"""The commands `bnlab lab list`, `run` and `report`."""

from __future__ import annotations

import json
import os

import pytest
from tests.unit.report.experiment_samples import experiment

import bnlab


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Make the train-eval experiment fast, and change to an empty folder."""
    from bnlab.lab.experiments.train_eval import Config, TrainEval

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


@pytest.fixture
def kept(small, bnlab_command):
    """A folder with a record of train-eval and one of bias, which is later in the catalogue."""
    from bnlab.lab.experiments.bias import Bias, Config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bias, "quick", Config(samples=16, features=2, steps=3))
        assert bnlab_command("lab", "run", "bias", "train-eval", "--folder", "kept")[0] == 0
    return small / "kept"


def record_of(folder, name):
    (path,) = folder.glob(f"{name}-*.json")
    return path


def test_report_is_a_page_of_every_record_in_the_order_of_the_catalogue(kept, bnlab_command):
    code, out, err = bnlab_command("lab", "report", "--folder", kept)
    assert (code, err) == (0, "")
    assert out.startswith("<!DOCTYPE html>")
    assert out.index(">train-eval<") < out.index(">bias<")
    assert "2 experiments, 9 claims: " in out


def test_report_as_text_into_a_file(kept, bnlab_command):
    code, out, err = bnlab_command("lab", "report", "--folder", kept, "--format", "text", "--output", "all.txt")
    assert (code, out, err) == (0, "", "")
    text = (kept.parent / "all.txt").read_text()
    assert text.startswith("train-eval  ")
    assert "\n\nbias  " in text


def test_report_complains_about_damaged_records_and_draws_the_others(kept, bnlab_command):
    record_of(kept, "bias").write_text('{"schema": "bnlab.experiment/1", "name": "\x1b[31m"}')
    (kept / "cut.json").write_text('{"schema": "bnlab.exp')
    code, out, err = bnlab_command("lab", "report", "--folder", kept, "--format", "text")
    assert code == 2
    assert out.startswith("train-eval  ")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert "\x1b" not in err


def test_report_names_foreign_files_and_passes_over_them(kept, bnlab_command):
    (kept / "settings.json").write_text('{"a": 1}')
    (kept / "newer.json").write_text('{"schema": "bnlab.experiment/2"}')
    (kept / "notes.txt").write_text("not JSON")
    code, out, err = bnlab_command("lab", "report", "--folder", kept)
    assert code == 0
    assert "2 experiments" in out
    notices = sorted(err.splitlines())
    assert len(notices) == 2
    assert all(line.startswith("passed over: ") for line in notices)
    assert "Update bnlab" in notices[0]


def test_report_draws_the_last_of_records_with_the_same_settings(kept, bnlab_command):
    newer = record_of(kept, "bias")
    older = kept / "older.json"
    older.write_text(newer.read_text().replace('"key": "', '"key": "other'))
    os.utime(older, (1, 1))
    code, out, err = bnlab_command("lab", "report", "--folder", kept)
    assert code == 0
    assert err == f"passed over: {older}: {newer.name} has the same settings and is newer\n"
    assert "other" + json.loads(newer.read_text())["key"] not in out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "error: --folder: folder must exist, got nowhere.\n"),
        ("empty", "error: --folder: folder must hold a record of an experiment, got none in empty. Run one: bnlab lab"),
    ],
)
def test_report_without_records_is_one_line(small, bnlab_command, folder, message):
    (small / "empty").mkdir()
    code, out, err = bnlab_command("lab", "report", "--folder", folder)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_run_writes_one_page_of_what_it_ran(small, bnlab_command):
    code, out, err = bnlab_command("lab", "run", "train-eval", "--format", "html", "--output", "page.html")
    assert (code, out, err) == (0, "", "")
    page = (small / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "window.vegaEmbed=" in page
    assert bnlab_command("lab", "run", "train-eval", "--format", "html")[1] == page


def test_run_writes_text_and_json_into_a_file(small, bnlab_command):
    shown = bnlab_command("lab", "run", "train-eval")[1]
    assert bnlab_command("lab", "run", "train-eval", "--output", "shown.txt") == (0, "", "")
    assert (small / "shown.txt").read_text().split() == shown.split()
    assert bnlab_command("lab", "run", "train-eval", "--format", "json", "--output", "shown.json") == (0, "", "")
    assert json.loads((small / "shown.json").read_text())["name"] == "train-eval"


def test_run_refuses_an_output_that_lies_nowhere_before_it_runs(small, bnlab_command):
    code, out, err = bnlab_command("lab", "run", "train-eval", "--output", "nowhere/page.html")
    assert (code, out) == (2, "")
    assert err == "error: --output: path must be a file in an existing folder, got nowhere/page.html.\n"
    assert not (small / "lab-records").exists()


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
def test_report_refuses_pipes_and_loops_at_once_and_draws_the_others(tmp_path, bnlab_command):
    (tmp_path / "whole.json").write_text(experiment().dumps())
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    code, out, err = bnlab_command("lab", "report", "--folder", tmp_path, "--format", "text")
    assert code == 2
    assert experiment().title in out
    refused = {line.split(": ")[1].rpartition("/")[2]: line.rpartition("got")[2] for line in err.splitlines()}
    assert refused == {
        "loop.json": ": too many levels of symbolic links.",
        **dict.fromkeys(("pipe.json", "folder.json", "zeros.json"), " a folder, pipe or device."),
    }


@pytest.mark.parametrize("format_", ["text", "html"])
def test_report_draws_the_others_where_a_record_contradicts_itself(tmp_path, bnlab_command, monkeypatch, format_):
    from bnlab.cli import lab

    (tmp_path / "whole.json").write_text(experiment().dumps())
    (tmp_path / "odd.json").write_text(experiment(name="odd").dumps())
    document = lab._document

    def contradict(records, format_):
        if any(record.name == "odd" for record in records):
            raise KeyError("no such column")
        return document(records, format_)

    monkeypatch.setattr(lab, "_document", contradict)
    code, out, err = bnlab_command("lab", "report", "--folder", tmp_path, "--format", format_)
    assert (code, err) == (2, "error: odd: record must be consistent to be drawn, got KeyError: 'no such column'.\n")
    assert experiment().title in out
    (tmp_path / "whole.json").unlink()
    assert bnlab_command("lab", "report", "--folder", tmp_path, "--format", format_) == (2, "", err)


def test_report_refuses_an_output_that_lies_nowhere(tmp_path, bnlab_command):
    code, out, err = bnlab_command("lab", "report", "--folder", tmp_path, "--output", tmp_path / "none" / "a")
    assert (code, out) == (2, "")
    assert err.startswith("error: --output: path must be a file in an existing folder")
