import json
import subprocess
import sys

import pytest
from tests import samples
from tests.unit.report.html_samples import Page, complete, diagnosis, receipt

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
sys.argv = ["bnlab", *sys.argv[1:]]
from bnlab.cli.main import main
main()
"""


@pytest.fixture
def saved(tmp_path):
    def write(*records):
        path = tmp_path / "record.json"
        path.write_text("\n".join(record.dumps() for record in records), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("format_", ["text", "html"])
@pytest.mark.parametrize("record", [complete(), receipt()], ids=["diagnosis", "receipt"])
def test_a_saved_record_is_drawn_without_torch(saved, tmp_path, record, format_):
    output = tmp_path / "drawn"
    arguments = ["report", saved(record), "--format", format_, "--output", output]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = output.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") == (format_ == "html")


def test_json_lines_of_several_targets_become_one_page(saved, bnlab_command):
    code, out, err = bnlab_command("report", saved(diagnosis(), complete()), "--format", "html")
    assert (code, err) == (0, "")
    assert Page(out).unbalanced == []
    assert "2 targets" in Page(out).text


def test_indented_json_is_read_too(tmp_path, bnlab_command):
    path = tmp_path / "record.json"
    path.write_text(complete().dumps(indent=2), encoding="utf-8")
    code, out, _ = bnlab_command("report", path)
    assert code == 0
    assert complete().conclusion[:20] in out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "file must hold a record, got none"),
        ("{", "file must be JSON or JSON Lines"),
        ("[1, 2]", "schema must be one of bnlab.diagnosis/1"),
        ('{"schema": "bnlab.diagnosis/2"}', "Update bnlab: the file is of another version"),
        ('{"schema": "other/1"}', "got 'other/1'"),
        ('{"schema": ["x"]}', "schema must be one of"),
        ('{"schema": "bnlab.diagnosis/1"}', "record must follow bnlab.diagnosis/1"),
        (b"\xff\xfe\x00", "got bytes that are no text"),
        ("[" * 100_000, "file must be JSON"),
    ],
)
def test_a_damaged_or_newer_file_is_one_clear_line(tmp_path, bnlab_command, content, told):
    path = tmp_path / "record.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = bnlab_command("report", path, "--format", "html")
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_a_record_with_one_broken_value_is_damaged(saved, bnlab_command):
    path = saved(complete())
    data = json.loads(path.read_text(encoding="utf-8"))
    data["layers"][0]["channels"] = "many"
    path.write_text(json.dumps(data), encoding="utf-8")
    code, _, err = bnlab_command("report", path)
    assert code == 2
    assert "layers[0].channels: value must be of type int" in err


def test_the_output_is_never_the_input(saved, bnlab_command):
    path = saved(complete())
    before = path.read_bytes()
    assert bnlab_command("report", path, "--format", "html", "--output", path)[0] == 2
    assert path.read_bytes() == before


def test_records_of_different_kinds_make_no_page(saved, bnlab_command):
    code, _, err = bnlab_command("report", saved(complete(), receipt()), "--format", "html")
    assert code == 2
    assert "of one kind" in err


def test_check_writes_a_page_with_a_value_for_each_channel(tmp_path, bnlab_command):
    path = samples.save(samples.state_dict("bn1", "bn2"), tmp_path / "model.pt")
    output = tmp_path / "page.html"
    code, out, _ = bnlab_command("check", path, "--format", "html", "--output", output)
    assert (code, out) == (0, "")
    page = Page(output.read_text(encoding="utf-8"))
    assert page.unbalanced == []
    assert "running_mean" in json.dumps(page.data)


def test_check_writes_one_page_of_several_targets(tmp_path, bnlab_command):
    for name in ("a", "b"):
        samples.save(samples.state_dict("bn1"), tmp_path / f"{name}.pt")
    code, out, _ = bnlab_command("check", tmp_path, "--format", "html")
    assert code == 0
    assert "2 targets" in Page(out).text


def test_check_writes_sarif_with_every_rule_and_what_failed(tmp_path, bnlab_command):
    state = samples.state_dict("bn1")
    state["bn1.running_var"][1] = -1
    path = samples.save(state, tmp_path / "model.pt")
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:300])
    code, out, _ = bnlab_command("check", tmp_path, "--format", "sarif")
    assert code == 2
    (run,) = json.loads(out)["runs"]
    assert {result["ruleId"] for result in run["results"]} >= {"BN102"}
    assert len(run["tool"]["driver"]["rules"]) == 34
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"]
    assert "broken.pt" in json.dumps(invocation)


def test_sarif_says_where_a_model_is_written(tmp_path, monkeypatch, bnlab_command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model_for_sarif.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    )
    code, out, _ = bnlab_command("check", "own_model_for_sarif:build", "--format", "sarif", "--level", "info")
    assert code == 1
    location = json.loads(out)["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "own_model_for_sarif.py"
    assert location["region"]["startLine"] == 4


def test_per_channel_puts_values_into_the_json(tmp_path, bnlab_command):
    path = samples.save(samples.state_dict("bn1"), tmp_path / "model.pt")
    plain = json.loads(bnlab_command("check", path, "--format", "json")[1])
    full = json.loads(bnlab_command("check", path, "--format", "json", "--per-channel")[1])
    assert plain["layers"][0]["per_channel"] is None
    assert len(full["layers"][0]["per_channel"]["running_var"]) == full["layers"][0]["channels"]


def test_repair_prints_a_page(tmp_path, bnlab_command):
    spec = "bnlab.lab.stuck_statistics:build_network"
    code, out, _ = bnlab_command(
        "repair", spec, "--data", "digits", "--format", "html", "--output", tmp_path / "mended.pt"
    )
    assert code in (0, 1)
    assert Page(out).unbalanced == []
    assert spec in out
