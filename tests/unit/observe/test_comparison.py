"""The comparison adds a verdict by loss to the evidence, and the metric can withdraw or give it."""

import copy

import numpy as np
import pytest
import torch
from tests.blobs import HELD_OUT, TRAINING, blobs, corrupted, trained
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, mse_loss

import bnlab
from bnlab.checks.cases import model, model_layer
from bnlab.observe.comparison import Comparison, _judged_by_metric
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.metric import Score
from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.subject import Subject
from bnlab.records import Advice, Numbers, StatisticsVerdict

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def healthy():
    return trained()


@pytest.fixture(scope="module")
def of_eval_mode():
    return trained(in_eval_mode=True)


def accuracy(network, data):
    """Return the share of right answers."""
    right = [(network(points).argmax(1) == labels).double() for points, labels in data]
    return float(torch.cat(right).mean())


def of_the_whole(network, data):
    if len(list(data)) < 2:
        raise ValueError("two batches at least")
    return accuracy(network, data)


def loss_of(network, batch):
    return cross_entropy(network(batch[0]), batch[1])


def without_labels(data):
    """Hide the labels from the cross-entropy, and not from the metric of the test."""
    return [(points, {"y": labels}) for points, labels in data]


def compared(network, stale, *, metric=None, lower=False, loss=None, train_data=TRAINING, data=HELD_OUT):
    subject, modules = Subject(network), any_batch_norm(network)
    score = None if metric is None else Score(metric, lower, "height")
    held_out = keep("data", data, "auto")
    reference = held_out if train_data is None else keep("train_data", train_data, "auto")
    comparison = Comparison(
        subject=subject,
        modules=modules,
        loss=loss,
        score=score,
        reference=reference,
        held_out=None if train_data is None else held_out,
        advance=lambda: None,
    )
    evidence = model(*(model_layer(name) for name in modules))
    measured_on = None if train_data is None else reference
    return comparison.add_to(evidence, stale, held_out, held_out, measured_on)


def hidden_accuracy(network, data):
    return accuracy(network, [(points, labels["y"]) for points, labels in data])


def test_without_a_stale_layer_there_is_no_verdict(healthy):
    evidence = compared(healthy, [])
    assert evidence.statistics is None
    assert evidence.numbers is None


def test_cross_entropy_decides_where_there_are_labels(healthy):
    verdict = compared(corrupted(healthy), ["4"], metric=accuracy).statistics
    assert (verdict.advice, verdict.decided_by, verdict.layers) == (Advice.RECALIBRATE, "cross-entropy", ("4",))


def test_the_loss_of_the_caller_decides_before_the_cross_entropy(healthy):
    sick = corrupted(healthy)
    verdict = compared(sick, ["4"], loss=loss_of).statistics
    assert (verdict.advice, verdict.decided_by) == (Advice.RECALIBRATE, "loss")
    constant = compared(sick, ["4"], loss=lambda network, batch: torch.tensor(1.0)).statistics
    assert (constant.advice, constant.decided_by) == (Advice.NO_DIFFERENCE, "loss")


@pytest.mark.parametrize("lower", [True, False])
def test_a_metric_decides_where_there_is_no_loss(healthy, lower):
    def height(network, data):
        value = hidden_accuracy(network, data)
        return 1 - value if lower else value

    data = {"train_data": without_labels(TRAINING), "data": without_labels(HELD_OUT)}
    verdict = compared(corrupted(healthy), ["4"], metric=height, lower=lower, **data).statistics
    assert (verdict.advice, verdict.decided_by) == (Advice.RECALIBRATE, "height")
    if lower is False:
        wrong = compared(corrupted(healthy), ["4"], metric=height, lower=True, **data).statistics
        assert wrong.advice is not Advice.RECALIBRATE


def test_a_metric_of_the_whole_data_decides_by_its_value(healthy, of_eval_mode):
    data = {"train_data": without_labels(TRAINING), "data": without_labels(HELD_OUT)}

    def metric(network, batches):
        return of_the_whole(network, [(points, labels["y"]) for points, labels in batches])

    sick = compared(corrupted(healthy), ["4"], metric=metric, **data)
    assert (sick.statistics.advice, sick.statistics.decided_by) == (Advice.RECALIBRATE, "height")
    assert sick.statistics.running == -sick.numbers.train_running
    assert sick.statistics.recalibrated == -sick.numbers.train_recalibrated
    kept = compared(of_eval_mode, ["1", "4"], metric=metric, **data)
    assert kept.statistics.advice is Advice.KEEP


def test_a_metric_alone_does_not_silence_the_checks(of_eval_mode):
    """Its direction may be the wrong one, so that the layers keep their gap; a loss has only one direction."""
    data = {"train_data": without_labels(TRAINING), "data": without_labels(HELD_OUT)}
    of_metric = compared(of_eval_mode, ["1", "4"], metric=hidden_accuracy, **data)
    of_loss = compared(of_eval_mode, ["1", "4"], metric=accuracy)
    assert of_metric.statistics.advice is of_loss.statistics.advice is Advice.KEEP
    assert not any(layer.trained_with or layer.gap is None for layer in of_metric.layers)
    assert all(layer.trained_with and layer.gap is None for layer in of_loss.layers)


def test_without_anything_that_decides_the_verdict_is_undecided(healthy):
    data = {"train_data": without_labels(TRAINING), "data": without_labels(HELD_OUT)}
    assert compared(corrupted(healthy), ["4"], **data).statistics.advice is Advice.UNDECIDED


def test_layers_that_the_weights_were_trained_with_have_no_gap(healthy, of_eval_mode):
    kept = compared(of_eval_mode, ["1", "4"], metric=accuracy)
    assert kept.statistics.advice is Advice.KEEP
    assert all(layer.trained_with and layer.gap is None for layer in kept.layers)
    one = compared(of_eval_mode, ["4"], metric=accuracy)
    assert [(layer.name, layer.trained_with, layer.gap is None) for layer in one.layers] == [
        ("1", False, False),
        ("4", True, True),
    ]
    sick = compared(corrupted(healthy), ["4"], metric=accuracy)
    assert not any(layer.trained_with or layer.gap is None for layer in sick.layers)


def test_the_metric_on_the_data_withdraws_the_advice(healthy):
    def likes_it_stale(network, data):
        return float(network[4].running_var.mean()) if network[4].running_var is not None else 0.0

    verdict = compared(corrupted(healthy), ["4"], metric=likes_it_stale).statistics
    assert verdict.advice is Advice.WORSE_ON_DATA
    assert verdict.recalibrated < verdict.running


def test_data_that_get_worse_withdraw_the_advice(healthy):
    elsewhere = blobs(320, 3, shift=6.0)
    adapted = copy.deepcopy(healthy)
    bnlab.recalibrate(adapted, elsewhere)
    verdict = compared(adapted, ["1", "4"], metric=accuracy, data=elsewhere).statistics
    assert verdict.advice is Advice.WORSE_ON_DATA


def test_recalibrated_numbers_are_those_of_the_layers_of_the_verdict(of_eval_mode):
    sick = corrupted(of_eval_mode)
    evidence = compared(sick, ["4", "1"], metric=accuracy)
    assert evidence.statistics.layers == ("4",)
    values = {}
    for layers in (["4"], ["1", "4"]):
        twin = copy.deepcopy(sick)
        bnlab.recalibrate(twin, TRAINING, layers=layers)
        values[len(layers)] = accuracy(twin, HELD_OUT)
    assert values[1] > values[2]
    assert evidence.numbers.eval_recalibrated == pytest.approx(values[1])
    assert evidence.numbers.eval_running == accuracy(sick, HELD_OUT)


def test_without_training_data_the_data_decide(healthy):
    evidence = compared(corrupted(healthy), ["4"], metric=accuracy, train_data=None)
    assert evidence.statistics.data == "data"
    assert evidence.statistics.advice is Advice.RECALIBRATE
    assert evidence.numbers.train_running is None


def judged(advice, running, recalibrated, *, error=None, train=(None, None), lower=False, errors=1.0):
    numbers = Numbers(
        train_batch=None,
        eval_batch=running,
        eval_running=running,
        eval_recalibrated=recalibrated,
        train_running=train[0],
        train_recalibrated=train[1],
        lower_is_better=lower,
    )
    verdict = StatisticsVerdict(advice=advice, layers=("bn",), decided_by=None, data="data")
    evidence = model(statistics=verdict, numbers=numbers, recalibrated_error=error)
    return _judged_by_metric(evidence, Score(accuracy, lower, "height", errors)).statistics


@pytest.mark.parametrize(
    ("running", "recalibrated", "advice"),
    [
        (0.5, 0.9, Advice.RECALIBRATE),
        (0.9, 0.5, Advice.KEEP),
        (0.9, 0.905, Advice.NO_DIFFERENCE),
        (0.9, 0.895, Advice.NO_DIFFERENCE),
        (0.9, 0.9, Advice.NO_DIFFERENCE),
        (-2.0, -1.0, Advice.RECALIBRATE),
        (-1.0, -2.0, Advice.KEEP),
        (0.0, 0.1, Advice.RECALIBRATE),
    ],
)
@pytest.mark.parametrize("lower", [True, False])
def test_a_metric_of_the_whole_counts_above_one_percent(running, recalibrated, advice, lower):
    sign = -1 if lower else 1
    values = (sign * running, sign * recalibrated)
    verdict = judged(Advice.UNDECIDED, *values, lower=lower)
    assert (verdict.advice, verdict.decided_by) == (advice, "height")
    assert (verdict.running, verdict.recalibrated) == (-running, -recalibrated)


def test_the_training_data_decide_and_the_data_have_a_veto():
    assert judged(Advice.UNDECIDED, 0.7, 0.8, train=(0.9, 0.5)).advice is Advice.KEEP
    assert judged(Advice.UNDECIDED, 0.8, 0.7, train=(0.5, 0.9)).advice is Advice.WORSE_ON_DATA
    assert judged(Advice.UNDECIDED, 0.7, 0.8, train=(0.5, 0.9)).advice is Advice.RECALIBRATE


@pytest.mark.parametrize(
    ("running", "recalibrated", "error", "lower", "advice"),
    [
        (0.9, 0.8, 0.01, False, Advice.WORSE_ON_DATA),
        (0.9, 0.8, 0.2, False, Advice.RECALIBRATE),
        (0.9, 0.8, None, False, Advice.WORSE_ON_DATA),
        (0.9, 0.8, 0.01, True, Advice.RECALIBRATE),
        (0.8, 0.9, 0.01, True, Advice.WORSE_ON_DATA),
        (0.9, 0.9, 0.0, False, Advice.RECALIBRATE),
    ],
)
def test_a_metric_withdraws_the_advice_above_one_standard_error(running, recalibrated, error, lower, advice):
    assert judged(Advice.RECALIBRATE, running, recalibrated, error=error, lower=lower).advice is advice


@pytest.mark.parametrize(
    ("errors", "error", "advice"),
    [
        (1.0, 0.09, Advice.WORSE_ON_DATA),
        (1.0, 0.11, Advice.RECALIBRATE),
        (2.0, 0.04, Advice.WORSE_ON_DATA),
        (2.0, 0.09, Advice.RECALIBRATE),
    ],
)
def test_a_score_withdraws_the_advice_above_its_number_of_errors(errors, error, advice):
    assert judged(Advice.RECALIBRATE, 0.9, 0.8, error=error, errors=errors).advice is advice


@pytest.mark.parametrize("advice", [Advice.KEEP, Advice.NO_DIFFERENCE, Advice.WORSE_ON_DATA])
def test_a_metric_does_not_change_other_verdicts(advice):
    assert judged(advice, 0.1, 0.9).advice is advice
    assert judged(advice, 0.9, 0.1).advice is advice


def autoencoder_of_eval_mode():
    """Return a network that was trained in eval mode to return its input."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).eval()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(10):
        for points, _ in TRAINING:
            optimizer.zero_grad()
            mse_loss(network(points), points).backward()
            optimizer.step()
    return network


def reconstruction_error(network, data):
    return float(torch.cat([(network(points) - points).square().mean(1) for points, _ in data]).mean())


def test_labels_that_an_autoencoder_does_not_predict_decide_nothing():
    """The labels of the classes stand beside an output of shape (N, 8), as if it were the scores of 8 classes."""
    network = autoencoder_of_eval_mode()
    verdict = compared(network, ["1"]).statistics
    assert (verdict.advice, verdict.layers, verdict.decided_by) == (Advice.UNDECIDED, ("1",), None)
    kept = compared(network, ["1"], metric=reconstruction_error, lower=True).statistics
    assert (kept.advice, kept.decided_by) == (Advice.KEEP, "height")
    before = copy.deepcopy(network.state_dict())
    bnlab.repair(network, data=HELD_OUT, train_data=TRAINING)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_sample_that_is_not_a_number_does_not_change_the_verdict(healthy):
    points, labels = TRAINING[3]
    points = points.clone()
    points[5] = torch.nan
    train_data = [*TRAINING[:3], (points, labels), *TRAINING[4:]]
    diagnosis = bnlab.check(corrupted(healthy), data=HELD_OUT, train_data=train_data)
    assert "recalibrating lowers the cross-entropy on the training data" in diagnosis.conclusion
    assert "train_data: 1 batch was left out of every layer that gets a NaN or inf" in diagnosis.notes
    (stale,) = (finding for finding in diagnosis.findings if finding.code == "BN401")
    assert (stale.layer, "recalibrate" in stale.remedies) == ("4", True)


class ForeignNorm(nn.Module):
    """A BN layer of another library, which is no `_BatchNorm` of torch, with statistics of something else."""

    def __init__(self, channels):
        super().__init__()
        self.momentum, self.eps = 0.1, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.full((channels,), 9.0))
        self.register_buffer("running_var", torch.full((channels,), 7.0))

    def forward(self, x):
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def test_a_verdict_holds_no_layer_of_a_foreign_class(healthy):
    sick = corrupted(healthy)
    sick[1] = ForeignNorm(16).eval()
    assert compared(sick, ["1"]).statistics is None
    assert compared(sick, ["1", "4"]).statistics.layers == ("4",)
    before = copy.deepcopy(sick[1].state_dict())
    was = accuracy(sick, HELD_OUT)
    bnlab.repair(sick, data=HELD_OUT, train_data=TRAINING, metric=accuracy)
    assert all(torch.equal(value, before[name]) for name, value in sick[1].state_dict().items())
    assert accuracy(sick, HELD_OUT) > was


def test_the_model_is_untouched(healthy):
    sick = corrupted(healthy).train()
    before, state = copy.deepcopy(sick.state_dict()), torch.get_rng_state()
    drawn = np.random.get_state()[1].copy()
    compared(sick, ["4", "1"], metric=accuracy, loss=loss_of)
    assert all(torch.equal(value, before[name]) for name, value in sick.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], drawn)
    assert all(module.training for module in sick.modules())
