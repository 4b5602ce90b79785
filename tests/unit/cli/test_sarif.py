import json

from tests import samples

from bnlab.checks import CHECKS


def test_check_writes_sarif_with_every_rule_and_what_failed(tmp_path, bnlab_command):
    state = samples.state_dict("bn1")
    state["bn1.running_var"][1] = -1
    path = samples.save(state, tmp_path / "model.pt")
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:300])
    code, out, _ = bnlab_command("check", tmp_path, "--format", "sarif")
    assert code == 2
    (run,) = json.loads(out)["runs"]
    assert {result["ruleId"] for result in run["results"]} >= {"BN102"}
    assert len(run["tool"]["driver"]["rules"]) == len(CHECKS)
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
