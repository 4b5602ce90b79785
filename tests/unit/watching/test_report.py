import json

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import BnlabWarning


@pytest.fixture
def watched():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps):
        for _ in range(steps):
            model(torch.randn(32, 4)).square().mean().backward()
            optimizer.step()

    with bnlab.watch(model, optimizer, every=2) as watch:
        train(45)
        model.eval()
        with pytest.warns(BnlabWarning, match="BN605"):
            train(5)
    return watch


def test_the_report_is_a_diagnosis_with_events_and_history(watched):
    diagnosis = watched.report()
    (finding,) = [finding for finding in diagnosis.findings if finding.code == "BN605"]
    assert finding.measured["step"].value == 45
    statuses = {outcome.code: outcome.status.value for outcome in diagnosis.outcomes}
    assert statuses["BN605"] == "findings"
    assert statuses["BN104"] == "passed"
    assert diagnosis.summary.warnings == sum(one.level.value == "warning" for one in diagnosis.findings)
    assert "in 50 optimizer steps, BN605 TrainedInEvalMode happened first at step 45 in 1" in diagnosis.conclusion
    (history,) = diagnosis.history
    assert history.layer == "1"
    assert len(history.steps) == len(history.lag) == len(history.running_var) > 10
    assert "BN605" in str(diagnosis)


def test_the_report_can_be_saved_and_read(watched, tmp_path):
    text = json.dumps(watched.report().to_json(), allow_nan=False)
    assert bnlab.Diagnosis.from_json(json.loads(text)).history == watched.report().history


def test_a_run_without_steps_skips_its_checks():
    model = nn.BatchNorm1d(3)
    diagnosis = bnlab.watch(model).report()
    outcomes = [outcome for outcome in diagnosis.outcomes if outcome.code.startswith("BN6")]
    assert outcomes
    assert all(outcome.reason == "no optimizer step was watched" for outcome in outcomes)
