import json
import subprocess
import sys

import pytest
from tests.unit.report.html_samples import Page, complete, diagnosis, finding, layer, receipt

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
def test_a_file_of_an_older_version_is_drawn_with_its_problems(bnlab_command, tmp_path, format_):
    layers = [layer(name) for name in ("bn1", "bn2")]
    findings = [finding(one.name, code) for code in ("BN301", "BN401") for one in layers]
    old = diagnosis(layers, findings).to_json()
    for key in ("statistics", "assumption"):
        del old[key]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old), encoding="utf-8")
    code, out, err = bnlab_command("report", path, "--format", format_)
    assert (code, err) == (0, "")
    assert "0 errors, 1 warning in 2 layers, 0 notes" in out
    assert "StaleStatistics in 2 layers, also BN301" in out


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


def test_the_output_is_never_the_input(saved, bnlab_command):
    path = saved(complete())
    before = path.read_bytes()
    assert bnlab_command("report", path, "--format", "html", "--output", path)[0] == 2
    assert path.read_bytes() == before


def test_records_of_different_kinds_make_no_page(saved, bnlab_command):
    code, _, err = bnlab_command("report", saved(complete(), receipt()), "--format", "html")
    assert code == 2
    assert "of one kind" in err
