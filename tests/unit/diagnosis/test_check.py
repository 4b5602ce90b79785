import pytest
import torch
from tests.samples import layer_state, save, small_network, state_dict
from torch import nn

import bnlab
from bnlab import checks, diagnosis
from bnlab.checks import CHECKS, Needs
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.records import DiagnosisRecord, Target


def test_a_healthy_checkpoint(tmp_path):
    result = bnlab.check(save(small_network().state_dict(), tmp_path / "a.pt"), momentum=0.1)
    assert isinstance(result, DiagnosisRecord)
    assert result.findings == ()
    assert result.summary.layers == 2
    assert result.summary.channels == 12
    by = f"by {sum(check.needs is Needs.STATE for check in CHECKS)} of {len(CHECKS)} checks"
    assert result.conclusion == f"no errors and no warnings in the stored state of 2 BN layers, {by}"
    by_group = {(outcome.code[:3], outcome.status.value) for outcome in result.outcomes}
    of_graphs = {outcome.code for outcome in result.outcomes if "the graph of an ONNX file" in (outcome.reason or "")}
    assert of_graphs == {"BN115", "BN116"}
    by_group -= {("BN1", "skipped")}
    assert by_group == {("BN1", "passed"), *((group, "skipped") for group in ("BN2", "BN3", "BN4", "BN5"))}
    assert [outcome.code for outcome in result.outcomes] == [check.code for check in checks.CHECKS]
    assert (result.causes, result.numbers) == ((), None)


def test_a_model_is_checked_with_its_own_momentum():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.001))
    for _ in range(90):
        model(5 * torch.randn(64, 3))
    result = bnlab.check(model)
    assert result.target == Target("model", "Sequential")
    assert [finding.code for finding in result.findings] == ["BN105"]
    assert "at momentum 0.001" in result.findings[0].message
    assert result.notes == ()


def test_the_same_checkpoint_needs_the_momentum_stated(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.001))
    for _ in range(90):
        model(5 * torch.randn(64, 3))
    path = save(model.state_dict(), tmp_path / "a.pt")
    assert bnlab.check(path).findings == ()
    assert [finding.code for finding in bnlab.check(path, momentum=0.001).findings] == ["BN105"]
    assert bnlab.check(path, momentum=None).findings == ()


def test_assumptions_are_notes(tmp_path):
    path = save(state_dict("bn"), tmp_path / "a.pt")
    assert bnlab.check(path).notes == (
        "BN105 would fire at a momentum below 0.00216 (0.1 is assumed)",
        "momentum 0.1 is assumed in 1 of 1 layers: a state dict does not hold it",
        "eps 1e-05 is assumed in 1 of 1 layers: a state dict does not hold it",
    )
    assert bnlab.check(path, momentum=0.1, eps=1e-5).notes == ()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": torch.ones(2)}, "checkpoint must hold running statistics of batch normalization, got none."),
        (
            {"vq.running_mean": torch.ones(2, 3), "vq.running_var": torch.ones(2, 3), "o.running_mean": torch.ones(2)},
            (
                "checkpoint must hold running statistics of batch normalization, got only similar state: "
                "vq running_mean has the shape (2, 3), not the (C,) of a BN layer (and 1 more)."
            ),
        ),
    ],
)
def test_a_checkpoint_without_batch_norm(tmp_path, tree, message):
    path = save(tree, tmp_path / "a.pt")
    with pytest.raises(NoBatchNorm) as err:
        bnlab.check(path)
    assert str(err.value) == f"{path}: {message}"


def test_a_model_without_batch_norm():
    with pytest.raises(
        NoBatchNorm, match="Linear: model must hold running statistics of batch normalization, got none"
    ):
        bnlab.check(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [None, 3, b"a.pt"])
def test_a_target_is_a_path_or_a_model(target):
    with pytest.raises(UsageError, match=r"check: target must be a path, a torch\.nn\.Module or its state dict, got"):
        bnlab.check(target)


def test_a_diagnosis_survives_json_and_its_repr_is_one_line(tmp_path):
    result = bnlab.check(save(state_dict("bn"), tmp_path / "a.pt"))
    again = bnlab.Diagnosis.from_json(result.to_json())
    assert again == result
    assert str(again) == str(result)
    assert repr(result).startswith("<Diagnosis of '")
    assert len(repr(result)) < 300


def test_a_diagnosis_prints_as_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({f"bn.{key}": value for key, value in layer_state().items()}, tmp_path / "a.pt")
    assert str(bnlab.check("a.pt")).startswith("a.pt\n1 BN layer, 4 channels, float32\n")


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'diagnose'"):
        bnlab.diagnose  # noqa: B018 - the access is the test
    assert set(bnlab.__all__) <= set(dir(bnlab))
    assert diagnosis.check is bnlab.check


def trained_for(steps, *, updating=0, optimizer_class=torch.optim.Adam):
    """Return a model and its optimizer after some steps, of which only the last `updating` update the statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    for step in range(steps):
        model.train(step >= steps - updating)
        optimizer.zero_grad()
        model(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()
    return model.eval(), optimizer


@pytest.mark.parametrize(
    ("steps", "updating", "note"),
    [
        (60, 0, "the optimizer took 60 steps and no layer counted more than 0 batches"),
        (60, 1, "the optimizer took 60 steps and no layer counted more than 1 batch"),
        (60, 59, "the optimizer took 60 steps and no layer counted more than 59 batches"),
        (1200, 50, "the optimizer took 1,200 steps and no layer counted more than 50 batches"),
        (60, 60, None),
        (0, 0, None),
    ],
)
def test_more_steps_of_the_optimizer_than_updates_are_a_note(steps, updating, note):
    model, optimizer = trained_for(steps, updating=updating)
    notes = bnlab.check(model, example=torch.randn(8, 3), optimizer=optimizer).notes
    expected = () if note is None else (f"{note}: the weights changed while the statistics did not",)
    assert tuple(text for text in notes if "the optimizer took" in text) == expected


def test_more_updates_than_steps_are_no_note():
    model, optimizer = trained_for(60, updating=60)
    for _ in range(30):
        model.train()(torch.randn(16, 3))
    assert not bnlab.check(model, example=torch.randn(8, 3), optimizer=optimizer).notes


def test_an_optimizer_without_a_step_count_gives_no_note():
    model, optimizer = trained_for(60, optimizer_class=torch.optim.SGD)
    notes = bnlab.check(model, example=torch.randn(8, 3), optimizer=optimizer).notes
    assert not any("the optimizer took" in text for text in notes)
