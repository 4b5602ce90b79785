import json
import os
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


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
def test_what_is_no_file_is_refused_at_once(bnlab_command, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for path, reason in (
        (tmp_path / "pipe.json", "file must be a regular file, got a folder, pipe or device."),
        (tmp_path, "file must be a regular file, got a folder, pipe or device."),
        ("/dev/zero", "file must be a regular file, got a folder, pipe or device."),
        (tmp_path / "loop.json", "file must be readable, got: too many levels of symbolic links."),
    ):
        assert bnlab_command("report", path) == (2, "", f"error: {path}: {reason}\n")


@pytest.mark.parametrize("format_", ["text", "html"])
def test_a_record_that_contradicts_itself_is_one_line(bnlab_command, saved, monkeypatch, format_):
    def contradict(*_):
        raise KeyError("no such column")

    monkeypatch.setattr("bnlab.cli.report._page", contradict)
    monkeypatch.setattr("bnlab.cli.report._text", contradict)
    path = saved(diagnosis())
    assert bnlab_command("report", path, "--format", format_) == (
        2,
        "",
        f"error: {path}: record must be consistent to be drawn, got KeyError: 'no such column'.\n",
    )


@pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")
def test_outputs_that_cannot_be_written_are_one_line(bnlab_command, saved, tmp_path):
    record = saved(diagnosis())
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "read-only").touch()
    (tmp_path / "read-only").chmod(0o444)
    for name, reason in (
        ("loop", "too many levels of symbolic links"),
        ("read-only", "read-only file. Choose another path"),
        ("n" * 300, "file name too long"),
        (".", "path must be a file in an existing folder"),
        ("none/a", "path must be a file in an existing folder"),
        ("/dev/full", "no space left on device"),
    ):
        code, out, err = bnlab_command("report", record, "--output", tmp_path / name)
        assert (code, out) == (2, ""), name
        assert err.startswith("error: --output: path must be ")
        assert reason in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "read-only", "record.json"]


@pytest.mark.filterwarnings("always")
@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_hard_link_that_is_cut_is_named_on_stderr(bnlab_command, saved, tmp_path):
    record, output = saved(diagnosis()), tmp_path / "a.txt"
    output.touch(mode=0o600)
    os.link(output, tmp_path / "b.txt")
    code, out, err = bnlab_command("report", record, "--output", output)
    assert (code, out) == (0, "")
    assert (
        err == f"warning: {output}: the hard link is cut: the old content stays under 1 other name of the old file.\n"
    )
    assert output.stat().st_mode & 0o777 == 0o600
