"""The loss on the training data shows whether the weights need the stored statistics or recalibrated ones."""

import copy
import random

import numpy as np
import pytest
import torch
from tests.blobs import HELD_OUT, TRAINING, blobs, corrupted, sorted_by_label, trained
from torch import nn
from torch.nn.functional import cross_entropy

import bnlab
from bnlab.observe.losses import cross_entropy_measure, loss_measure
from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.subject import Subject
from bnlab.observe.statistics_verdict import decide, pooled_statistics
from bnlab.records import Advice

pytestmark = pytest.mark.trains

SORTED = sorted_by_label(TRAINING)


@pytest.fixture(scope="module")
def healthy():
    return trained()


@pytest.fixture(scope="module")
def of_eval_mode():
    return trained(in_eval_mode=True)


def verdict_on(model, stale, train_data=TRAINING, data=None, *, measure="cross-entropy"):
    subject, reference = Subject(model), keep("train_data", train_data, "auto")
    if measure == "cross-entropy":
        measure = cross_entropy_measure(model, reference)
    held_out = None if data is None else keep("data", data, "auto")
    measures = () if measure is None else (measure,)
    return decide(subject, {name: model.get_submodule(name) for name in stale}, measures, reference, held_out)


def batch_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def mean_cross_entropy(model, data):
    """Return the mean cross-entropy of all samples in float64, with numpy alone after the forward pass."""
    with torch.no_grad():
        scores = np.concatenate([model(x).double().numpy() for x, _ in data])
    labels = np.concatenate([y.numpy() for _, y in data])
    logs = scores - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True))
    logs -= scores.max(1, keepdims=True)
    return float(-logs[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("stale", [("4",), ("4", "1")])
def test_corrupted_statistics_are_to_be_recalibrated(healthy, stale):
    model = corrupted(healthy)
    verdict = verdict_on(model, stale, data=HELD_OUT)
    assert verdict.advice is Advice.RECALIBRATE
    assert verdict.decided_by == "cross-entropy"
    assert "4" in verdict.layers
    assert verdict.running == pytest.approx(mean_cross_entropy(model, TRAINING), rel=1e-4)
    assert verdict.data_running == pytest.approx(mean_cross_entropy(model, HELD_OUT), rel=1e-4)
    assert verdict.running - verdict.recalibrated > 2 * verdict.standard_error > 0
    assert verdict.data_recalibrated < verdict.data_running / 10


def test_the_loss_after_recalibration_is_that_of_a_recalibrated_model(healthy):
    """The verdict is cross-fitted, so that its loss is near, and not equal to, that of statistics of all batches."""
    model = corrupted(healthy, mean=0.7, var=1.0)
    verdict = verdict_on(model, ["4"], data=HELD_OUT)
    bnlab.recalibrate(model, TRAINING, layers=["4"])
    assert verdict.data_recalibrated == pytest.approx(mean_cross_entropy(model, HELD_OUT), rel=0.3)
    assert verdict.recalibrated == pytest.approx(mean_cross_entropy(model, TRAINING), rel=0.3)
    assert verdict.running > 10 * verdict.recalibrated


def test_weights_that_were_trained_in_eval_mode_keep_their_statistics(of_eval_mode):
    verdict = verdict_on(of_eval_mode, ["1", "4"], data=HELD_OUT)
    assert verdict.advice is Advice.KEEP
    assert verdict.layers == ("1", "4")
    assert verdict.running == pytest.approx(mean_cross_entropy(of_eval_mode, TRAINING), rel=1e-4)
    assert verdict.running < verdict.recalibrated
    assert verdict.data_running is None


def test_weights_that_were_trained_in_train_mode_do_not_keep_the_initial_statistics(healthy):
    """The buffers are those of `of_eval_mode`, and the weights are not."""
    model = copy.deepcopy(healthy)
    for name in ("1", "4"):
        model.get_submodule(name).reset_running_stats()
    assert verdict_on(model, ["1", "4"]).advice is Advice.RECALIBRATE


@pytest.mark.parametrize("train_data", [TRAINING, SORTED], ids=["mixed", "sorted"])
def test_one_corrupted_layer_among_trained_ones_is_chosen_alone(of_eval_mode, train_data):
    model = corrupted(of_eval_mode)
    verdict = verdict_on(model, ["4", "1"], train_data)
    assert verdict.advice is Advice.RECALIBRATE
    assert verdict.layers == ("4",)
    both = copy.deepcopy(model)
    bnlab.recalibrate(both, TRAINING)
    bnlab.recalibrate(model, TRAINING, layers=["4"])
    assert mean_cross_entropy(model, TRAINING) < mean_cross_entropy(both, TRAINING)


@pytest.mark.parametrize("stale", [("1",), ("4",), ("1", "4"), ("4", "1")])
def test_sorted_batches_do_not_flip_the_verdict(healthy, of_eval_mode, stale):
    model = corrupted(healthy, stale[0])
    for network, advice in ((model, Advice.RECALIBRATE), (of_eval_mode, Advice.KEEP)):
        mixed, ordered = verdict_on(network, stale), verdict_on(network, stale, SORTED)
        assert mixed.advice is ordered.advice is advice
        assert stale[0] in mixed.layers
        assert stale[0] in ordered.layers
        assert ordered.recalibrated == pytest.approx(mixed.recalibrated, rel=0.1, abs=0.02)


@pytest.mark.parametrize("train_data", [TRAINING, SORTED], ids=["mixed", "sorted"])
def test_every_layer_of_a_network_trained_in_eval_mode_is_kept(of_eval_mode, train_data):
    """The first batches of sorted data hold one class, on which other statistics of one layer lower the loss."""
    assert verdict_on(of_eval_mode, ["1", "4"], train_data).layers == ("1", "4")


@pytest.mark.parametrize("count", [4, 8, 20])
@pytest.mark.parametrize("stale", [("1",), ("4",), ("1", "4")])
def test_batches_of_two_classes_in_turn_do_not_flip_the_verdict(healthy, of_eval_mode, stale, count):
    """If one half held the even batches, each half would be recalibrated on the other class."""
    none, one = ([batch for batch in SORTED if set(batch[1].tolist()) == {label}] for label in (0, 1))
    in_turn = [batch for pair in zip(none, one, strict=False) for batch in pair][:count]
    assert [int(labels[0]) for _, labels in in_turn[:4]] == [0, 1, 0, 1]
    assert verdict_on(of_eval_mode, stale, in_turn).advice is Advice.KEEP
    assert verdict_on(corrupted(healthy, stale[-1]), stale, in_turn).advice is Advice.RECALIBRATE


@pytest.mark.parametrize("data", [None, HELD_OUT])
def test_a_loss_that_does_not_depend_on_the_statistics_makes_no_difference(healthy, data):
    model = corrupted(healthy)
    nn.init.zeros_(model[6].weight)
    verdict = verdict_on(model, ["4"], data=data, measure=loss_measure(batch_loss, len(TRAINING)))
    assert verdict.advice is Advice.NO_DIFFERENCE
    assert verdict_on(model, ["4"], data=data).advice is Advice.UNDECIDED
    assert verdict.running == verdict.recalibrated
    assert verdict_on(corrupted(healthy), ["4"], data=data).advice is Advice.RECALIBRATE


def test_a_difference_within_two_standard_errors_is_none(healthy):
    """The loss of a part is a random number, whatever the statistics are."""
    numbers = iter(np.random.default_rng(0).normal(size=10_000).tolist())
    noise = loss_measure(lambda model, batch: torch.tensor(next(numbers)), len(TRAINING))
    verdict = verdict_on(corrupted(healthy), ["4"], measure=noise)
    assert verdict.advice is Advice.NO_DIFFERENCE
    assert 0 < abs(verdict.running - verdict.recalibrated) <= 2 * verdict.standard_error


def test_training_data_of_another_distribution_make_the_data_worse(healthy):
    """The statistics are those of the data, and the data are not distributed like the training data."""
    elsewhere = blobs(640, 3, shift=6.0)
    model = copy.deepcopy(healthy)
    bnlab.recalibrate(model, elsewhere)
    verdict = verdict_on(model, ["1", "4"], data=elsewhere)
    assert verdict.advice is Advice.WORSE_ON_DATA
    assert verdict.recalibrated < verdict.running
    assert verdict.data_recalibrated > verdict.data_running
    assert verdict_on(model, ["1", "4"], data=HELD_OUT).advice is Advice.RECALIBRATE
    assert verdict_on(model, ["1", "4"]).advice is Advice.RECALIBRATE


def test_without_a_loss_nothing_decides(healthy, of_eval_mode):
    for model in (corrupted(healthy), of_eval_mode):
        verdict = verdict_on(model, ["4", "1"], measure=None)
        assert verdict.advice is Advice.UNDECIDED
        assert verdict.layers == ("4", "1")
        assert (verdict.decided_by, verdict.running, verdict.recalibrated) == (None, None, None)


@pytest.mark.parametrize(
    "train_data",
    [
        [tuple(part[:3] for part in TRAINING[0])],
        [tuple(part[:5] for part in TRAINING[0])],
        [TRAINING[0], (HELD_OUT[0][0],)],
    ],
    ids=["three samples", "a half of one sample", "a batch without labels"],
)
def test_data_that_are_too_few_or_have_no_labels_decide_nothing(healthy, train_data):
    model = corrupted(healthy)
    measure = cross_entropy_measure(model, TRAINING)
    assert verdict_on(model, ["4"], train_data, measure=measure).advice is Advice.UNDECIDED
    assert verdict_on(model, ["4"], [TRAINING[0]], measure=measure).advice is Advice.RECALIBRATE


def test_data_without_labels_have_no_veto(healthy):
    verdict = verdict_on(corrupted(healthy), ["4"], data=[points for points, _ in HELD_OUT])
    assert verdict.advice is Advice.RECALIBRATE
    assert verdict.data_running is None


@pytest.mark.parametrize(("data", "name"), [(None, "data"), (HELD_OUT, "train_data")])
def test_the_verdict_names_the_data_that_decide(healthy, data, name):
    assert verdict_on(corrupted(healthy), ["4"], data=data).data == name
    assert verdict_on(corrupted(healthy), ["4"], data=data, measure=None).data == name


def test_a_layer_that_is_no_batch_norm_of_torch_leaves_it_undecided(healthy):
    assert verdict_on(corrupted(healthy), ["4", "6"]).advice is Advice.UNDECIDED


def test_cross_entropies_above_that_of_a_constant_output_decide_nothing(of_eval_mode):
    """The head points the other way: the loss grows with the confidence, so that it is lower with other statistics."""
    model = copy.deepcopy(of_eval_mode)
    with torch.no_grad():
        model[6].weight.neg_()
        model[6].bias.neg_()
        model[1].running_var.fill_(1e4)
    assert mean_cross_entropy(model, TRAINING) > np.log(2)
    of_labels = verdict_on(model, ["1"])
    assert (of_labels.advice, of_labels.decided_by) == (Advice.UNDECIDED, None)
    of_loss = verdict_on(model, ["1"], measure=loss_measure(batch_loss, len(TRAINING)))
    assert (of_loss.advice, of_loss.decided_by) == (Advice.KEEP, "loss")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_its_random_numbers_are_untouched(healthy, training):
    model = nn.Sequential(*corrupted(healthy), nn.Dropout(0.5)).train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    before = [tensor.clone() for tensor in tensors]
    places = [tensor.data_ptr() for tensor in tensors]

    def draws(model, batch):
        random.random()
        np.random.rand()
        torch.rand(1)
        return cross_entropy(model(batch[0]), batch[1])

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    verdict = verdict_on(model, ["4", "1"], data=HELD_OUT, measure=loss_measure(draws, len(TRAINING)))
    assert verdict.advice is Advice.RECALIBRATE
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    now = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    assert all(torch.equal(old, new) for old, new in zip(before, now, strict=True))
    assert [tensor.data_ptr() for tensor in now] == places
    assert {module.training for module in model.modules()} == {training}


class OnGraph(nn.Module):
    """Takes nodes and edges as one input, and reads the neighbours of every node without any effect."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, graph):
        nodes, (sources, targets) = graph
        return self.network(nodes + 0 * torch.zeros_like(nodes).index_add(0, targets, nodes[sources]))


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_single_graph_cannot_be_cut_and_decides_nothing(healthy, with_loss):
    """Its edges point at nodes that a half does not have."""
    points, labels = (torch.cat(column) for column in zip(*TRAINING, strict=True))
    edges = torch.stack([torch.arange(640), torch.arange(640).roll(1)])
    graph, model = ((points, edges), labels), OnGraph(corrupted(healthy)).eval()
    measure = loss_measure(batch_loss, 1) if with_loss else "cross-entropy"
    assert verdict_on(model, ["network.4"], [graph], measure=measure).advice is Advice.UNDECIDED
    two = [((x, edges[:, :0]), y) for x, y in TRAINING[:2]]
    assert verdict_on(model, ["network.4"], two, measure=measure).advice is Advice.RECALIBRATE
    loss = batch_loss if with_loss else None
    for data, whole in ([graph], None), ([graph] * 2, [graph] * 4):
        diagnosis = bnlab.check(model, data=data, train_data=whole, loss=loss)
        assert {finding.layer for finding in diagnosis.findings if finding.code == "BN401"} == {"network.4"}
        assert ("recalibrate may help" in diagnosis.conclusion) is (whole is None and loss is None)


def test_every_batch_of_a_pass_for_statistics_is_reported(healthy):
    calls = []
    subject, data = Subject(corrupted(healthy)), keep("data", TRAINING, "auto")
    layers = {"4": subject.model[4]}
    decide(subject, layers, [cross_entropy_measure(subject.model, data)], data, None, advance=lambda: calls.append(1))
    assert len(calls) >= len(TRAINING) / 2


def test_pooled_statistics_are_those_of_all_values_that_reach_the_layer(healthy):
    """Only the pooled layer changes: the layer before it normalises with its running statistics."""
    model = corrupted(healthy)
    pooled = pooled_statistics(Subject(model), {"4": model[4]}, TRAINING)
    assert list(pooled) == [model[4]]
    with torch.no_grad():
        values = torch.cat([model[:4](points) for points, _ in TRAINING]).double().numpy()
    mean, var = pooled[model[4]]
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, values.var(0, ddof=1), rtol=1e-5, atol=1e-6)
