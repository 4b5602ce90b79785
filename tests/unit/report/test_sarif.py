import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tests.samples import save, state_dict

from bnlab.checks import CHECKS
from bnlab.checks.cases import healthy, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence
from bnlab.records import DiagnosisRecord, Finding, Level, Outcome, Quantity, Status, Summary, Target
from bnlab.report import sarif
from bnlab.report.sarif import RuleText, Source

SCHEMA = json.loads((Path(__file__).parents[2] / "data" / "sarif-2.1.0.json").read_text(encoding="utf-8"))
RULES = {check.code: RuleText(check.name, check.title, check.page, check.group.level) for check in CHECKS}
ALL_LEVELS = (
    healthy("layer1.0.bn1", running_var=(-9.8e-4, 1, 1, 1)),
    healthy("layer1.0.bn2", running_mean=(0, 0, 0, 0), running_var=(1, 1, 1, 1)),
    healthy("head.bn", weight=(1e-6, 1, 1, 1)),
)


def diagnose(*layers, name="nets/model.pt"):
    return _diagnose(Evidence((network(*layers),), ()), Target("checkpoint", name), Settings.of())


def finding(layer="bn", *, code="BN102", level=Level.ERROR, value=-1.0, channels=(0,), remedies=("recalibrate",)):
    return Finding(
        code=code,
        level=level,
        layer=layer,
        channels=channels,
        message=f"running_var is {value:g} in 1 of 4 channels, must be >= 0",
        why="eval mode divides by the root of it",
        measured={"running_var": Quantity(value, "input^2")},
        threshold={"running_var": Quantity(0.0, "input^2")},
        remedies=remedies,
    )


def record(*findings, outcomes=(), target=None, version="0.1.0"):
    return DiagnosisRecord(
        bnlab=version,
        target=target or Target("checkpoint", "model.pt"),
        layers=(),
        outcomes=tuple(outcomes),
        findings=findings,
        conclusion="something is the matter",
        summary=Summary(layers=0, channels=0, errors=0, warnings=0, infos=0),
    )


def run_of(*diagnoses, **options):
    log = json.loads(sarif.render(diagnoses, **options))
    jsonschema.validate(log, SCHEMA)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert run["artifacts"][place["index"]]["location"]["uri"] == place["uri"]
        assert len(result["message"]["text"]) <= 1000
    return run


def notes_of(run):
    return [(item["level"], item["message"]["text"]) for item in run["invocations"][0]["toolExecutionNotifications"]]


def where(run):
    return run["results"][0]["locations"][0]["physicalLocation"]


def test_a_checkpoint_with_every_level():
    run = run_of(diagnose(*ALL_LEVELS), rules=RULES)
    assert {result["level"] for result in run["results"]} == {"error", "warning", "note"}
    first = run["results"][0]
    assert first["ruleId"] == "BN102"
    assert first["message"]["text"] == (
        "layer1.0.bn1: running_var is -0.00098 in 1 of 4 channels, must be >= 0. Remedy: recalibrate (buffers only)."
    )
    (location,) = first["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "nets/model.pt", "uriBaseId": "%SRCROOT%", "index": 0},
        "region": {"startLine": 1},
    }
    assert location["logicalLocations"] == [
        {"name": "bn1", "fullyQualifiedName": "layer1.0.bn1", "kind": "member"},
    ]
    assert first["properties"]["measured"] == {"running_var": {"value": -9.8e-4, "unit": "input^2"}}
    assert first["properties"]["channels"] == [0]
    assert run["artifacts"][0]["description"]["text"].startswith("layer1.0.bn1: running_var is")
    assert run["invocations"][0]["executionSuccessful"] is True


def test_a_rule_says_what_a_viewer_shows():
    run = run_of(diagnose(*ALL_LEVELS), rules=RULES)
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [check.code for check in CHECKS]
    rule = run["tool"]["driver"]["rules"][1]
    assert (rule["id"], rule["name"]) == ("BN102", "NegativeRunningVariance")
    assert rule["shortDescription"]["text"] == "Running variance below zero."
    assert rule["fullDescription"]["text"].startswith("Running variance below zero. Below -eps the square root is NaN")
    assert rule["help"]["markdown"] == rule["help"]["text"] == RULES["BN102"].page
    assert rule["defaultConfiguration"]["level"] == "error"
    assert rule["properties"]["tags"] == ["batch-normalization", "correctness"]
    for described in run["tool"]["driver"]["rules"]:
        assert len(described["shortDescription"]["text"]) <= len(described["fullDescription"]["text"]) <= 1000


def test_without_the_texts_of_the_checks_a_rule_is_described_by_its_finding():
    rule = run_of(record(finding()))["tool"]["driver"]["rules"][0]
    assert rule["shortDescription"]["text"] == rule["help"]["text"] == "eval mode divides by the root of it."
    assert rule["defaultConfiguration"]["level"] == "error"
    assert "name" not in rule


def test_the_version_is_that_of_the_records():
    driver = run_of(record(version="0.1.0"))["tool"]["driver"]
    assert (driver["name"], driver["version"], driver["semanticVersion"]) == ("bnlab", "0.1.0", "0.1.0")
    assert "semanticVersion" not in run_of(record(version="0.1.0.dev3"))["tool"]["driver"]


def test_no_findings_and_no_targets():
    assert run_of(diagnose(healthy("bn")), rules=RULES)["results"] == []
    assert run_of()["results"] == run_of()["artifacts"] == []


def test_findings_below_the_level_are_left_out_and_counted():
    run = run_of(diagnose(*ALL_LEVELS), rules=RULES, level=Level.ERROR)
    assert [result["ruleId"] for result in run["results"]] == ["BN102"]
    assert ("note", "findings left out because they are below error: 2") in notes_of(run)


def test_what_a_diagnosis_leaves_out_is_an_error_of_the_run():
    (invocation,) = run_of(replace(record(), failure="bn2 has no running_var"))["invocations"]
    assert not invocation["executionSuccessful"]
    (left_out,) = (item for item in invocation["toolExecutionNotifications"] if item["level"] == "error")
    assert left_out["message"]["text"] == "bn2 has no running_var"
    assert left_out["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model.pt"


def test_a_crashed_check_is_an_error_of_the_run_and_a_skipped_one_a_note():
    outcomes = (
        Outcome("BN101", Status.PASSED),
        Outcome("BN102", Status.CRASHED, "ValueError: no"),
        Outcome("BN105", Status.SKIPPED, "num_batches_tracked is absent in 1 of 1 layers"),
    )
    run = run_of(record(outcomes=outcomes), record(outcomes=outcomes[2:], target=Target("checkpoint", "b.pt")))
    invocation = run["invocations"][0]
    assert invocation["executionSuccessful"] is False
    crashed, skipped = invocation["toolExecutionNotifications"]
    assert (crashed["level"], crashed["message"]["text"]) == ("error", "BN102 crashed: ValueError: no")
    assert crashed["associatedRule"] == {"id": "BN102", "index": 1}
    assert crashed["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model.pt"
    assert skipped["level"] == "note"
    assert skipped["message"]["text"] == (
        "BN105 was skipped in 2 of 2 targets: num_batches_tracked is absent in 1 of 1 layers"
    )


def test_a_target_that_could_not_be_checked_is_an_error_of_the_run():
    run = run_of(record(), failures=["empty.pt: file must be a checkpoint, got an empty file."])
    assert notes_of(run) == [("error", "empty.pt: file must be a checkpoint, got an empty file.")]
    assert run["invocations"][0]["executionSuccessful"] is False


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("model.pt", "model.pt"),
        ("./nets/../nets/a b#1%.pt", "nets/a%20b%231%25.pt"),
        ("nets\\model.pt", "nets/model.pt"),
        ("../other/model.pt", "../other/model.pt"),
        ("a:b?.pt", "a%3Ab%3F.pt"),
        ("网络.pt", "%E7%BD%91%E7%BB%9C.pt"),
        ("/data/model.pt", "file:///data/model.pt"),
        ("C:\\nets\\model 1.pt", "file:///C:/nets/model%201.pt"),
        ("a\nb\ud800.pt", "a%0Ab%ED%A0%80.pt"),
        ("", "."),
    ],
)
def test_paths_become_uris(name, uri):
    place = where(run_of(record(finding(), target=Target("checkpoint", name))))["artifactLocation"]
    assert place["uri"] == uri
    assert ("uriBaseId" in place) is not uri.startswith("file:")


def test_a_model_is_where_its_code_is():
    target = Target("model", "nets:build")
    place = where(run_of(record(finding(), target=target), sources={"nets:build": Source("src/nets.py", 12)}))
    assert place["artifactLocation"]["uri"] == "src/nets.py"
    assert place["region"] == {"startLine": 12}
    nowhere = where(run_of(record(finding(), target=target)))
    assert (nowhere["artifactLocation"]["uri"], nowhere["region"]) == ("nets%3Abuild", {"startLine": 1})


HOSTILE = (
    "\x1b[31mred\x07\r\n\u202e\x00",
    "<script>alert(1)</script>",
    "[click](https://example.org)",
    "x" * 2**20,
    "",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_strange_layer_names_stay_text(name):
    run = run_of(record(finding(name)))
    (result,) = run["results"]
    text = result["message"]["text"]
    assert not set(text) & set("\x1b\x07\r\n\u202e\x00")
    assert "](" not in text
    assert "running_var is -1 in 1 of 4 channels, must be >= 0. Remedy: recalibrate" in text
    assert len(json.dumps(run)) < 10_000
    assert (("note", "results whose text was cut: 1") in notes_of(run)) is (len(name) > 1000)


def test_a_finding_on_the_whole_network_and_advice():
    (result,) = run_of(record(finding(None, channels=None, remedies=("set-momentum", "manual"))))["results"]
    assert result["message"]["text"].startswith("the network: ")
    assert result["message"]["text"].endswith("Remedy: set-momentum (buffers only) or by hand.")
    assert "logicalLocations" not in result["locations"][0]
    assert "channels" not in result["properties"]


def test_numbers_that_are_not_finite_are_strings():
    run = run_of(record(*(finding(value=value) for value in (math.nan, math.inf, -math.inf))))
    measured = [result["properties"]["measured"]["running_var"]["value"] for result in run["results"]]
    assert measured == ["nan", "inf", "-inf"]


def test_many_channels_are_counted():
    (result,) = run_of(record(finding(channels=tuple(range(5000)))))["results"]
    assert result["properties"]["channels"] == list(range(100))
    assert result["properties"]["channelCount"] == 5000


def fingerprints(*diagnoses):
    return [result["partialFingerprints"]["primaryLocationLineHash"] for result in run_of(*diagnoses)["results"]]


def test_fingerprints_tell_findings_apart_and_stay_when_numbers_change():
    other = Target("checkpoint", "other.pt")
    findings = (finding("a"), finding("b"), finding("a", code="BN113"), finding(None), finding(None))
    first = fingerprints(record(*findings), record(finding("a"), target=other))
    assert len(set(first)) == 6
    assert fingerprints(record(finding("a", value=-2.0, channels=(1, 2)))) == first[:1]
    assert fingerprints(record(finding("a"), target=Target("checkpoint", "./model.pt"))) == first[:1]


def test_several_targets_are_one_run():
    run = run_of(diagnose(*ALL_LEVELS), diagnose(*ALL_LEVELS[:1], name="ema.pt"), rules=RULES)
    assert [artifact["location"]["uri"] for artifact in run["artifacts"]] == ["nets/model.pt", "ema.pt"]
    assert len(run["tool"]["driver"]["rules"]) == len(CHECKS)
    assert run["results"][-1]["locations"][0]["physicalLocation"]["artifactLocation"]["index"] == 1


def test_more_results_than_a_viewer_takes_leave_the_least_severe_out(monkeypatch):
    assert sarif._MAX_RESULTS == 25_000
    monkeypatch.setattr(sarif, "_MAX_RESULTS", 3)
    notes = (finding(str(i), code="BN108", level=Level.INFO) for i in range(3))
    run = run_of(record(*notes, finding("worst")))
    assert [result["level"] for result in run["results"]] == ["error", "note", "note"]
    notice = "only the 3 most severe of 4 findings are in this run: viewers accept no more"
    assert ("warning", notice) in notes_of(run)


def test_the_command_line_writes_the_log(bnlab_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = state_dict("bn1")
    state["bn1.running_var"][0] = -1
    save(state, tmp_path / "broken.pt")
    code, out, err = bnlab_command("check", "broken.pt", "--format", "sarif")
    assert (code, err) == (1, "")
    log = json.loads(out)
    jsonschema.validate(log, SCHEMA)
    assert [result["ruleId"] for result in log["runs"][0]["results"]] == ["BN102"]
