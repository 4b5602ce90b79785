import re

import pytest

import bnlab


@pytest.mark.trains
def test_demo_ends_in_the_findings_and_in_a_repair_that_is_verified(bnlab_command, tmp_path):
    pytest.importorskip("sklearn")
    code, out, err = bnlab_command("demo", "--output", tmp_path / "digits.pt")
    assert (code, err) == (0, "")
    batch, running = (float(line.split()[4]) for line in out.splitlines() if line.startswith("  accuracy with"))
    assert batch > 0.9 > 0.6 > running
    assert "WARNING BN105 StatisticsBarelyUpdated in 3 layers" in out
    text = " ".join(out.split())
    assert re.search(r"of the gap comes from [^;]+ in bn[123]", text)
    assert float(re.search(r"recalibrating brings accuracy (\d+(?:\.\d+)?)", text)[1]) > 0.9
    (finding, *_) = bnlab.check(tmp_path / "digits.pt", momentum=0.001).findings
    assert finding.code == "BN105"
    assert bnlab.check(tmp_path / "digits.pt").findings == ()
    assert "repair: 3 layers changed, buffers only" in out
    assert float(text.rpartition("has an accuracy of ")[2].split()[0]) > 0.9
    assert bnlab.check(tmp_path / "digits-mended.pt", momentum=0.001).summary.errors == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_training(bnlab_command, tmp_path):
    code, out, err = bnlab_command("demo", "--output", tmp_path / "none" / "a.pt")
    assert (code, out) == (2, "")
    assert err.startswith("error: --output: path must be a file in an existing folder, got ")
    (tmp_path / "a-mended.pt").touch()
    (tmp_path / "a-mended.pt").chmod(0o444)
    code, out, err = bnlab_command("demo", "--output", tmp_path / "a.pt")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --output: path must be writable, got {tmp_path / 'a-mended.pt'}: read-only file.")
