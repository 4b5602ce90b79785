import json

import pytest
from tests.samples import save, state_dict
from tests.unit.report.html_samples import diagnosis, finding, layer

import bnlab
from bnlab.cli.diagnosis_writer import CheckFormat, DiagnosisWriter
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.records import Level


@pytest.fixture
def check(tmp_path):
    """A check that knows four targets by name: one healthy, one broken, one without BN, one that fails."""
    broken = state_dict("bn")
    broken["bn.running_var"][0] = -1
    diagnoses = {
        "healthy": bnlab.check(save(state_dict("bn"), tmp_path / "healthy")),
        "broken": bnlab.check(save(broken, tmp_path / "broken")),
    }

    def check(target):
        if target in diagnoses:
            return diagnoses[target]
        raise NoBatchNorm(f"{target}: none") if target == "plain" else UsageError(f"{target}: unknown")

    return check


def writer(format_=CheckFormat.TEXT, output=None, level=Level.WARNING):
    return DiagnosisWriter(format_, level, output)


@pytest.mark.parametrize(
    ("target", "level", "code"), [("healthy", Level.INFO, 0), ("broken", Level.ERROR, 1), ("broken", Level.INFO, 1)]
)
@pytest.mark.parametrize("format_", list(CheckFormat))
def test_one_diagnosis_and_its_exit_code(check, capsys, format_, target, level, code):
    one = writer(format_, level=level)
    one.write_one(check(target))
    assert one.exit_code == code
    assert capsys.readouterr().out


def test_lines_as_they_come_and_a_summary(check, capsys):
    many = writer()
    many.write_many(["healthy", "broken", "plain", "odd"], check)
    captured = capsys.readouterr()
    *lines, summary = captured.out.splitlines()
    assert len(lines) == 3
    assert lines[2] == "plain: none"
    assert summary == ("4 targets: 2 checked with 2 BN layers, 1 error and 0 warnings; 1 without BN, 1 not readable")
    assert captured.err == "error: odd: unknown\n"
    assert (many.exit_code, many.has_findings, many.has_failed) == (2, True, True)


def test_lines_and_summary_count_problems_and_json_counts_findings(capsys):
    names = [f"bn{i}" for i in range(20)]
    findings = [finding(name, code) for code in ("BN105", "BN301", "BN401") for name in names]
    stale = diagnosis([layer(name) for name in names], findings)
    many = writer()
    many.write_many(["one", "two"], lambda _: stale)
    line, _, summary = capsys.readouterr().out.splitlines()
    assert line == "runs/my model.pt: 20 layers, 0 errors, 1 warning in 20 layers, 0 notes (BN105)"
    assert summary.startswith("2 targets: 2 checked with 40 BN layers, 0 errors and 2 warnings;")
    assert many.exit_code == 1
    writer(CheckFormat.JSON).write_one(stale)
    written = json.loads(capsys.readouterr().out)
    assert (written["summary"]["warnings"], len(written["findings"])) == (60, 60)
    writer(CheckFormat.SARIF).write_one(stale)
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert len(run["results"]) == 60


def test_json_lines_hold_diagnoses_alone(check, capsys):
    many = writer(CheckFormat.JSON)
    many.write_many(["plain", "healthy", "broken"], check)
    captured = capsys.readouterr()
    assert len([json.loads(line) for line in captured.out.splitlines()]) == 2
    assert captured.err == "plain: none\n"
    assert many.exit_code == 1


def test_targets_that_all_lack_batch_norm_are_a_failure(check, capsys):
    many = writer()
    many.write_many(["plain", "plain"], check)
    assert many.exit_code == 2
    assert "at least one must hold batch normalization" in capsys.readouterr().err


def test_a_document_of_all_goes_into_the_output(check, tmp_path, capsys):
    many = writer(CheckFormat.SARIF, tmp_path / "a.sarif")
    many.write_many(["healthy", "broken", "odd"], check)
    assert capsys.readouterr().out == ""
    (run,) = json.loads((tmp_path / "a.sarif").read_text())["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["BN102"]


@pytest.mark.parametrize("format_", [CheckFormat.TEXT, CheckFormat.JSON, CheckFormat.SARIF])
@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), EOFError(), OverflowError("too large")])
def test_a_crash_on_one_target_is_one_line_and_the_rest_goes_on(check, capsys, format_, error):
    def crashing(target):
        if target == "bad":
            raise error
        return check(target)

    many = writer(format_)
    many.write_many(["bad", "healthy", "broken"], crashing)
    captured = capsys.readouterr()
    assert "broken" in captured.out
    assert captured.err.startswith("error: bad: ")
    assert captured.err.count("\n") == 1
    assert type(error).__name__ in captured.err
    assert many.exit_code == 2
