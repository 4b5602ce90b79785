import re

import pytest

import bnlab
from bnlab.checks import CHECKS


def test_explain_a_check(bnlab_command):
    code, out, _ = bnlab_command("explain", "bn107")
    assert code == 0
    assert out == bnlab.explain("BN107")
    assert out.startswith("# BN107 AmplifyingChannel\n")


def test_explain_lists_every_check(bnlab_command):
    code, out, _ = bnlab_command("explain")
    assert code == 0
    assert all(check.code in out and check.name in out for check in CHECKS)


def test_explain_an_unknown_code(bnlab_command):
    code, out, err = bnlab_command("explain", "BN999")
    assert (code, out) == (2, "")
    assert err.startswith("error: check: code must be one of BN101, ")


def test_version(bnlab_command):
    assert bnlab_command("--version")[:2] == (0, f"bnlab {bnlab.__version__}\n")


def test_bench_names_what_there_is(bnlab_command):
    code, _, err = bnlab_command("bench", "nothing")
    assert code == 2
    names = "accuracy, check, diagnose, estimators, fold, mishaps, onednn, ops, recalibrate, small, training"
    assert err == f"error: bench: name must be one of {names}, got 'nothing'.\n"


def test_bench_outside_a_checkout(bnlab_command, monkeypatch, tmp_path):
    from bnlab.cli import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    code, _, err = bnlab_command("bench", "check")
    assert code == 2
    assert "source checkout" in err


@pytest.mark.trains
def test_demo_ends_in_the_findings_and_in_a_repair_that_is_verified(bnlab_command, tmp_path):
    pytest.importorskip("sklearn")
    code, out, err = bnlab_command("demo", "--output", tmp_path / "digits.pt")
    assert (code, err) == (0, "")
    batch, running = (float(line.split()[4]) for line in out.splitlines() if line.startswith("  accuracy with"))
    assert batch > 0.9 > 0.6 > running
    assert "WARNING BN105 in 3 layers" in out
    text = " ".join(out.split())
    assert re.search(r"of the gap comes from stale statistics in bn[123]", text)
    assert float(re.search(r"recalibrating brings (\d+(?:\.\d+)?)", text)[1]) > 0.9
    (finding, *_) = bnlab.check(tmp_path / "digits.pt", momentum=0.001).findings
    assert finding.code == "BN105"
    assert bnlab.check(tmp_path / "digits.pt").findings == ()
    assert "repair: 3 layers changed, buffers only" in out
    assert float(text.rpartition("has an accuracy of ")[2].split()[0]) > 0.9
    assert bnlab.check(tmp_path / "digits-mended.pt", momentum=0.001).summary.errors == 0
