"""`repair` on live models: it repairs them, proves the effect, and takes back remedies that lower the metric."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.blobs import HELD_OUT, TRAINING
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError
from bnlab.lab.metrics import accuracy
from bnlab.observe.metric import Measured
from bnlab.records import Advice, Level, Safety
from bnlab.repairing import plan

pytestmark = pytest.mark.trains


def network(momentum=0.1):
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 16),
        nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip


def trained(model, *, always_eval=False, epochs=6):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for points, labels in TRAINING:
            model.train(not always_eval)
            optimizer.zero_grad()
            cross_entropy(model(points), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def healthy():
    return trained(network())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    return all(torch.equal(now[name], value) for name, value in before.items())


def stale(healthy):
    model = copy.deepcopy(healthy)
    model[4].running_mean.add_(30)
    model[4].running_var.mul_(20)
    return model


def test_stale_statistics_are_recomputed_in_the_layer_that_has_them(healthy):
    model = stale(healthy)
    before, first = state(model), accuracy(model, HELD_OUT)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    changes = receipt.changes
    assert first < 0.8 < 0.95 < accuracy(model, HELD_OUT)
    assert {change.layer for change in changes.changes if change.what == "running statistics"} == {"4"}
    assert (changes.metric.before, changes.metric.after) == (first, accuracy(model, HELD_OUT))
    assert changes.kept
    assert {"BN401 4", "BN301 4"} <= set(changes.recheck.resolved)
    assert not changes.recheck.appeared
    assert not changes.recheck.after.warnings
    named = {"4.running_mean", "4.running_var", "1.num_batches_tracked", "4.num_batches_tracked"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items() if name not in named)
    receipt.undo()
    assert same(model, before)


def test_without_training_data_the_receipt_says_that_it_was_adapted(healthy):
    receipt = bnlab.repair(stale(healthy), data=HELD_OUT)
    assert "no train_data given: adapted to the evaluation data" in receipt.changes.notes
    assert accuracy(receipt.model, HELD_OUT) > 0.95


def without_labels(data):
    return [points for points, _ in data]


def test_without_labels_a_repair_is_proposed_and_not_applied(healthy):
    model = stale(healthy)
    before = state(model)
    data = {"data": without_labels(HELD_OUT), "train_data": without_labels(TRAINING)}
    receipt = bnlab.repair(model, **data)
    assert same(model, before)
    assert not receipt.changes.changes
    assert receipt.changes.recheck.after.warnings
    (reason,) = {left.reason.partition(": ")[2] for left in receipt.changes.left_alone}
    assert reason == "nothing shows that recalibrating helps: pass labels, loss= or metric=, or force=True"
    forced = bnlab.repair(model, **data, force=True)
    assert accuracy(model, HELD_OUT) > 0.95
    assert any(note.startswith("nothing shows that the repair improves the model") for note in forced.changes.notes)
    forced.undo()
    assert same(model, before)


def test_without_labels_statistics_that_are_not_numbers_are_recomputed(healthy):
    model = copy.deepcopy(healthy)
    model[4].running_mean[5] = math.nan
    model[1].running_var[3] = -1.0
    receipt = bnlab.repair(model, data=without_labels(HELD_OUT), train_data=without_labels(TRAINING))
    assert {"BN101 4", "BN102 1"} <= set(receipt.changes.recheck.resolved)
    assert accuracy(model, HELD_OUT) > 0.95


@pytest.mark.parametrize("labelled", [True, False])
def test_a_loss_decides_where_there_is_no_metric(healthy, labelled):
    """The labels are out of reach of the cross-entropy: they stand in a dict of their own."""
    model = stale(healthy)

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1]["y"])

    data, train_data = ([(x, {"y": y}) for x, y in batches] for batches in (HELD_OUT, TRAINING))
    receipt = bnlab.repair(model, data=data, train_data=train_data, loss=loss if labelled else None)
    assert bool(receipt.changes.changes) is labelled
    assert (accuracy(model, HELD_OUT) > 0.95) is labelled


def test_statistics_that_are_not_numbers_are_recomputed(healthy):
    model = copy.deepcopy(healthy)
    model[1].running_var[3], model[4].running_mean[5] = -1e-3, math.nan
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    assert {"BN101 4", "BN102 1"} <= set(receipt.changes.recheck.resolved)
    assert not receipt.changes.recheck.after.errors
    assert accuracy(model, HELD_OUT) > 0.95


@pytest.mark.parametrize("metric", [accuracy, None])
def test_a_network_always_run_in_eval_mode_is_not_damaged(metric):
    model = trained(network(), always_eval=True)
    first, before = accuracy(model, HELD_OUT), state(model)
    assert first > 0.95
    diagnosis = bnlab.check(model, data=HELD_OUT, train_data=TRAINING, metric=metric)
    assert not {"BN104", "BN105", "BN301", "BN401"} & {finding.code for finding in diagnosis.findings}
    assert diagnosis.conclusion.startswith("the weights were trained with these running statistics, in eval mode")
    assert diagnosis.statistics.advice is Advice.KEEP
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=metric, force=True)
    assert same(model, before)
    assert not receipt.changes.changes


def likes_it_stale(model, data):
    var = model[4].running_var
    return 0.0 if var is None else float(var.mean())


def test_a_repair_that_would_make_the_metric_worse_is_not_applied(healthy):
    model = stale(healthy)
    before = state(model)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=likes_it_stale)
    assert same(model, before)
    assert any("recalibrating makes the evaluation data worse" in left.reason for left in receipt.changes.left_alone)


@pytest.mark.parametrize("metric", [accuracy, None])
def test_a_repair_that_makes_the_data_worse_is_taken_back(healthy, metric, monkeypatch):
    model = copy.deepcopy(healthy)
    model[4].running_mean.add_(0.7)
    before, write = state(model), bnlab.remedies.recalibrate.write_statistics
    wrong = {"mean": 500.0}
    monkeypatch.setattr(
        "bnlab.remedies.recalibrate.write_statistics",
        lambda layers, new: write(layers, {path: (mean + wrong["mean"], var) for path, (mean, var) in new.items()}),
    )
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=metric)
    assert not receipt.changes.kept
    assert same(model, before)
    judged = "the cross-entropy on the data" if metric is None else "the metric"
    assert f"recalibrate was taken back: {judged} went from" in receipt.changes.notes[0]
    assert "taken back: the model is as it was" in str(receipt)


def test_only_what_makes_it_worse_is_taken_back(healthy):
    model = stale(healthy)
    model[1].momentum = 0.9
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=likes_it_stale)
    assert receipt.changes.kept
    assert [(change.layer, change.what, change.after) for change in receipt.changes.changes] == [
        ("1", "momentum", "0.1")
    ]
    assert model[1].momentum == pytest.approx(0.1)
    receipt.undo()
    assert model[1].momentum == 0.9


def test_the_model_is_restored_if_anything_raises(healthy):
    model = stale(healthy)
    before = state(model)
    calls = []

    def breaks_later(model, data):
        calls.append(1)
        if not torch.equal(model[4].running_var, before["4.running_var"]) and not calls[40:]:
            raise RuntimeError("no more")
        return accuracy(model, data)

    diagnosis = bnlab.check(model, data=HELD_OUT, train_data=TRAINING)
    with pytest.raises(UsageError, match="no more"):
        bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=breaks_later, diagnosis=diagnosis)
    assert same(model, before)


def test_everything_is_taken_back_if_an_error_appears(healthy, monkeypatch):
    model = stale(healthy)
    before = state(model)

    def poisons(self, model, layers, material):
        from bnlab.remedies.running_statistics import stored_statistics, write_statistics

        mean, var = stored_statistics({"4": model[4]})["4"]
        written = write_statistics({"4": model[4]}, {"4": (mean, -var)})
        receipt = bnlab.recalibrate(copy.deepcopy(model), material.batches)
        receipt._undo = written.undo
        return receipt

    monkeypatch.setattr("bnlab.remedies.recalibrate.Recalibrate.apply", poisons)
    monkeypatch.setattr("bnlab.repairing._Quality.why_worse_than", lambda self, before: None)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING)
    assert not receipt.changes.kept
    assert "BN102 4" in receipt.changes.recheck.appeared
    assert "everything was taken back: the checks found an error that was not there before" in receipt.changes.notes
    assert same(model, before)


def test_a_dry_run_changes_nothing_and_prints_the_plan(healthy):
    model = stale(healthy)
    before = state(model)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=accuracy, dry_run=True)
    assert same(model, before)
    assert receipt.changes.planned
    assert "repair: 1 layer to change, buffers only; nothing has been changed yet" in str(receipt)
    assert "-> recomputed (4)" in str(receipt)


def test_a_plan_is_pure_and_the_same_every_time(healthy):
    diagnosis = bnlab.check(stale(healthy), data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    plans = [plan(diagnosis, Safety.STATISTICS, Level.WARNING) for _ in range(2)]
    assert plans[0] == plans[1]
    assert [remedy.name for remedy in plans[0].layers] == ["recalibrate"]


def test_a_healthy_model_is_left_as_it_is(healthy):
    model = copy.deepcopy(healthy)
    before = state(model)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    assert same(model, before)
    assert receipt.changes.notes == ("nothing to repair",)
    assert not receipt.changes.changes


def test_a_bias_is_dropped_only_at_level_info_and_the_output_stays(healthy):
    model = copy.deepcopy(healthy)
    x = HELD_OUT[0][0]
    before, output, train_output = state(model), model(x), copy.deepcopy(model).train()(x)
    bias = model[0].bias
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, metric=accuracy, safety="exact", level="info")
    assert model[0].bias is None
    assert model[3].bias is None
    assert model[6].bias is not None
    assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    assert_close(copy.deepcopy(model).train()(x), train_output, rtol=1e-4, atol=1e-5)
    assert_close(model[1].running_mean, before["1.running_mean"] - before["0.bias"])
    assert "BN201 1" in receipt.changes.recheck.resolved
    receipt.undo()
    assert model[0].bias is bias
    assert same(model, before)


def test_freezing_needs_safety_behaviour(healthy):
    model = copy.deepcopy(healthy).train()
    for layer in (model[1], model[4]):
        layer.requires_grad_(False)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING)
    assert any(
        "freeze changes behaviour: pass safety='behaviour' to allow it" in left.reason
        for left in receipt.changes.left_alone
    )
    before = state(model)
    receipt = bnlab.repair(model, data=HELD_OUT, train_data=TRAINING, safety="behaviour")
    assert receipt.changes.safety is Safety.BEHAVIOUR
    model.train()(HELD_OUT[0][0])
    assert same(model, before)
    receipt.undo()
    assert type(model[1]) is nn.BatchNorm1d


def test_sorted_training_data_is_measured_layer_by_layer(healthy):
    model = stale(healthy)
    points, labels = (torch.cat(column) for column in zip(*TRAINING, strict=True))
    order = labels.argsort(stable=True)
    ordered = list(zip(points[order].split(32), labels[order].split(32), strict=True))
    receipt = bnlab.repair(model, data=ordered, metric=accuracy, diagnosis=None)
    if receipt.changes.changes:
        assert "the batches differ from each other (BN403): recalibrated layer by layer" in receipt.changes.notes
    assert accuracy(model, HELD_OUT) > 0.95


def test_a_diagnosis_of_something_else_is_refused(healthy):
    other = bnlab.check(nn.Sequential(nn.Sequential(nn.BatchNorm1d(8))), data=[torch.randn(8, 8)])
    with pytest.raises(UsageError, match=r"diagnosis must be one of this model, got one with the layer '0\.0'"):
        bnlab.repair(copy.deepcopy(healthy), data=HELD_OUT, diagnosis=other)
    with pytest.raises(UsageError, match=r"diagnosis must be what bnlab\.check returned, got str"):
        bnlab.repair(copy.deepcopy(healthy), data=HELD_OUT, diagnosis="sick")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safety": "total"}, "safety must be one of exact, statistics, behaviour, got 'total'"),
        ({"safety": "statistic"}, "got 'statistic'. Did you mean 'statistics'?"),
        ({"metric": "acuracy"}, "got 'acuracy'. Did you mean 'accuracy'?"),
        ({"level": "loud"}, "level must be one of error, warning, info, got 'loud'"),
        ({"data": iter([])}, "got a one-shot list_iterator"),
        ({"data": []}, "it must hold at least one batch, got none"),
    ],
)
def test_arguments_that_are_wrong(healthy, arguments, message):
    with pytest.raises(UsageError, match=message):
        bnlab.repair(copy.deepcopy(healthy), **{"data": HELD_OUT, **arguments})


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (Measured(0.5, None), Measured(0.5, None), False),
        (Measured(0.5, None), Measured(0.4999, None), True),
        (Measured(0.5, (0.4, 0.6, 0.5)), Measured(0.49, (0.2, 0.8, 0.47)), False),
        (Measured(0.5, (0.4, 0.6, 0.5)), Measured(0.4, (0.3, 0.5, 0.4)), True),
        (Measured(math.nan, None), Measured(0.1, None), False),
        (Measured(0.1, None), Measured(math.nan, None), True),
        (Measured(0.5, (0.5, math.nan)), Measured(0.49, (0.49, math.nan)), True),
    ],
)
def test_worse_means_by_more_than_a_paired_standard_error(before, after, worse):
    assert after.is_worse_than(before) is worse


def test_the_receipt_follows_its_schema(healthy):
    import jsonschema

    from bnlab.records import Changes, json_schema

    receipt = bnlab.repair(stale(healthy), data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    data = receipt.changes.to_json()
    jsonschema.validate(data, json_schema("bnlab.receipt/1"))
    assert Changes.from_json(data) == receipt.changes


def test_bn401_names_the_reason_where_weights_are_an_average(healthy):
    from torch.optim.swa_utils import AveragedModel

    averaged = AveragedModel(healthy)
    averaged.update_parameters(healthy)
    averaged.module[4].running_mean.add_(30)
    messages = [f.message for f in bnlab.check(averaged, data=HELD_OUT).findings if f.code == "BN401"]
    assert messages
    assert all(": its weights are an average of 1 models" in message for message in messages)
    assert not any("average" in f.message for f in bnlab.check(stale(healthy), data=HELD_OUT).findings)


def test_data_that_is_nan_throughout_is_refused_and_changes_nothing(healthy):
    model = stale(healthy)
    before = state(model)
    data = [(torch.full((8, 8), math.nan), torch.zeros(8, dtype=torch.long)) for _ in range(3)]
    with pytest.raises(UsageError, match="data: its inputs must be finite, got NaN or inf in each of 3 batches"):
        bnlab.repair(model, data=data)
    assert same(model, before)
    bnlab.repair(model, data=[*data, *HELD_OUT])
    bnlab.freeze(model)
    bnlab.repair(model, data=HELD_OUT)
