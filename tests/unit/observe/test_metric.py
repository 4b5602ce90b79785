"""The metric under each choice of statistics, its error, its direction, and the layers that cost it."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bnlab
from bnlab.diagnosis.run_checks import stale_layers
from bnlab.diagnosis.settings import Settings
from bnlab.errors import BnlabWarning, UsageError
from bnlab.lab import metrics
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.inputs import Inputs
from bnlab.observe.metric import Measured, Score, measured, metric_name, paired_error
from bnlab.observe.model import read_model
from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.survey import survey
from bnlab.records import Advice


def network(*stale):
    """Return a network that keeps the sign of its input, some of whose layers have statistics of other data."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).eval()
    for index in stale:
        model[index].running_mean.fill_(50.0)
    return model


def batches(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(32, 1, generator=generator) for _ in range(count)]
    return [(x, x.flatten() > 0) for x in xs]


def agreement(model, data):
    """Return the share of samples whose output has the sign of the input."""
    pairs = [((model(x).flatten() > 0) == label).double() for x, label in data]
    return float(torch.cat(pairs).mean())


def evidence(model, data, **options):
    states = {layer.name: layer for state in read_model(model, Hyperparameters()).networks for layer in state.layers}
    inputs = Inputs(data=data, **{"metric": agreement, **options})
    return survey(model, states, inputs, partial(stale_layers, Settings.of()))


def test_the_numbers_are_those_of_the_metric_under_each_choice():
    model, data, train_data = network(0), batches(), batches(seed=1)
    seen = evidence(model, data, train_data=train_data).numbers
    with torch.no_grad():
        assert seen.eval_running == agreement(model, data)
        with impose_batch_statistics(model):
            assert seen.eval_batch == agreement(model, data)
            assert seen.train_batch == agreement(model, train_data)
        values = torch.cat([x for x, _ in train_data])
        model[0].running_mean.copy_(values.mean(0))
        model[0].running_var.copy_(values.var(0))
        assert seen.eval_recalibrated == pytest.approx(agreement(model, data), abs=0.02)
    assert seen.eval_running < 0.6 < 0.95 < seen.eval_batch


@pytest.mark.parametrize("stale", [(0,), (1,), (0, 1)])
def test_the_layers_that_cost_the_metric_are_named(stale):
    seen = evidence(network(*stale), batches())
    assert set(seen.statistics.layers) == {str(index) for index in stale}
    assert seen.statistics.advice is Advice.RECALIBRATE
    assert seen.statistics.decided_by == "agreement"
    assert seen.numbers.eval_recalibrated > 0.9 > 0.6 > seen.numbers.eval_running


def test_a_stale_layer_that_costs_nothing_needs_no_recalibration():
    """The statistics of the second layer scale its input and keep the sign, so that the metric stays the same."""
    model = network()
    model[1].running_var.fill_(400.0)
    seen = evidence(model, batches())
    assert seen.statistics.layers == ("1",)
    assert seen.statistics.advice is Advice.NO_DIFFERENCE


def test_nothing_is_named_where_nothing_is_lost():
    seen = evidence(network(), batches())
    assert seen.statistics is None
    assert seen.numbers.eval_running > 0.9


def disagreement(model, data):
    return 1 - agreement(model, data)


def test_a_metric_of_which_lower_is_better_gives_the_same_verdict():
    higher = evidence(network(0), batches())
    lower = evidence(network(0), batches(), metric=disagreement, lower_is_better=True)
    assert lower.statistics.advice is higher.statistics.advice is Advice.RECALIBRATE
    assert lower.statistics.layers == higher.statistics.layers
    assert lower.numbers.lower_is_better
    assert lower.numbers.eval_running == pytest.approx(1 - higher.numbers.eval_running)
    wrong = evidence(network(0), batches(), metric=disagreement)
    assert wrong.statistics.advice is not Advice.RECALIBRATE


def test_the_numbers_on_training_data_are_those_of_the_metric():
    model, train_data = network(0), batches(seed=1)
    seen = evidence(model, batches(), train_data=train_data).numbers
    with torch.no_grad():
        assert seen.train_running == agreement(model, train_data)
        values = torch.cat([x for x, _ in train_data])
        model[0].running_mean.copy_(values.mean(0))
        model[0].running_var.copy_(values.var(0))
        assert seen.train_recalibrated == pytest.approx(agreement(model, train_data), abs=0.02)
    without = evidence(network(0), batches()).numbers
    assert (without.train_batch, without.train_running, without.train_recalibrated) == (None, None, None)


def test_the_error_is_that_of_the_paired_difference_over_batches():
    model, data = network(0), batches()
    seen = evidence(model, data)
    with torch.no_grad():
        running = torch.tensor([agreement(model, [batch]) for batch in data]).double()
        with impose_batch_statistics(model):
            by_batch = torch.tensor([agreement(model, [batch]) for batch in data]).double()
    expected = float((by_batch - running).std()) / math.sqrt(len(data))
    assert seen.metric_error == pytest.approx(expected)


def test_a_metric_that_takes_no_single_batch_has_no_error():
    def needs_two(model, data):
        if len(list(data)) < 2:
            raise ValueError("two batches at least")
        return agreement(model, data)

    result = measured(network(), Score(needs_two), keep("data", batches(), "auto"))
    assert result.per_batch is None
    assert result.value > 0.9


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (Measured(0.9, None), Measured(0.9, None), False),
        (Measured(0.9, None), Measured(0.8999, None), True),
        (Measured(0.9, (0.8, 1.0, 0.9)), Measured(0.87, (0.9, 0.8, 0.9)), False),
        (Measured(0.9, (0.9, 0.9, 0.9)), Measured(0.8, (0.8, 0.8, 0.81)), True),
        (Measured(math.nan, None), Measured(0.1, None), False),
        (Measured(0.1, None), Measured(math.nan, None), True),
    ],
)
def test_worse_is_worse_by_more_than_a_standard_error(before, after, worse):
    assert after.is_worse_than(before) is worse


def test_what_a_metric_raises_is_one_line():
    def broken(model, data):
        raise RuntimeError("no\nlabels")

    with pytest.raises(UsageError, match=r"^metric: it must return a number, got RuntimeError: no labels$"):
        measured(network(), Score(broken), keep("data", batches(1), "auto"))


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (Measured(0.5, None, True), Measured(0.5, None, True), False),
        (Measured(0.5, None, True), Measured(0.5001, None, True), True),
        (Measured(0.5, None, True), Measured(0.4, None, True), False),
        (Measured(0.9, (0.8, 1.0, 0.9), True), Measured(0.93, (0.9, 0.9, 0.99), True), False),
        (Measured(0.9, (0.9, 0.9, 0.9), True), Measured(1.0, (1.0, 1.0, 0.99), True), True),
        (Measured(math.nan, None, True), Measured(0.1, None, True), False),
        (Measured(0.1, None, True), Measured(math.nan, None, True), True),
        (Measured(0.1, None, True), Measured(math.inf, None, True), True),
    ],
)
def test_a_larger_value_is_worse_where_lower_is_better(before, after, worse):
    assert after.is_worse_than(before) is worse


@pytest.mark.parametrize(("errors", "worse"), [(0.5, True), (1.0, True), (2.0, False)])
def test_a_score_is_worse_above_its_number_of_errors(errors, worse):
    """The differences 0.2, 0.1 and 0.0 have the mean 0.1 and the standard error 0.1/sqrt(3) = 0.058."""
    before, after = (0.9, 0.9, 0.9), (0.7, 0.8, 0.9)
    assert Measured(0.8, after, errors=errors).is_worse_than(Measured(0.9, before, errors=errors)) is worse
    assert measured(network(), Score(agreement, errors=errors), keep("data", batches(2), "auto")).errors == errors


@pytest.mark.parametrize("lower", [True, False])
def test_a_measured_metric_keeps_its_direction(lower):
    result = measured(network(), Score(agreement, lower), keep("data", batches(), "auto"))
    assert result.lower_is_better is lower
    worse, better = (0.1, -0.1) if lower else (-0.1, 0.1)
    assert Measured(result.value + worse, None, lower).is_worse_than(result)
    assert not Measured(result.value + better, None, lower).is_worse_than(result)
    assert Score(agreement, lower).higher(0.3) == (-0.3 if lower else 0.3)


def test_a_paired_error_needs_two_finite_differences():
    left, right = [0.5, 0.75, 1.0], [0.25, 0.75, 0.5]
    assert paired_error(left, right) == pytest.approx(0.25 / math.sqrt(3))
    assert paired_error([0.5, 1.0], [0.25, 0.75]) == 0
    for others in (None, [0.25], [0.25, math.nan, 0.5]):
        assert paired_error(left, others) is None
    assert paired_error([0.5], [0.25]) is None


def test_the_name_of_a_metric():
    assert metric_name(agreement) == "agreement"
    assert metric_name(lambda model, data: 0.0) == "the metric"
    assert metric_name(partial(agreement)) == "the metric"


def named(name):
    def metric(model, data):
        return agreement(model, data)

    metric.__name__ = name
    return metric


def warnings_of(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(warning.message) for warning in caught if issubclass(warning.category, BnlabWarning)]


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "CrossEntropyLoss", "mean_squared_error", "error_rate", "mse", "RMSE", "val_mse", "mae2",
     "mae", "perplexity"],
)  # fmt: skip
def test_a_name_that_says_that_lower_is_better_gives_a_warning(name):
    (message,) = warnings_of(lambda: Inputs(data=batches(1), metric=named(name)))
    assert message.startswith(f"metric: {name} is read as higher is better, although its name says the opposite.")
    assert "Pass lower_is_better=True" in message
    assert not warnings_of(lambda: Inputs(data=batches(1), metric=named(name), lower_is_better=True))


@pytest.mark.parametrize("name", ["accuracy", "f1", "auroc", "mean_iou", "psnr", "maestro", "msecond", "smae_rank"])
def test_another_name_gives_no_warning(name):
    assert not warnings_of(lambda: Inputs(data=batches(1), metric=named(name)))


def test_the_word_counts_inside_a_longer_one():
    """A warning too many can be silenced by renaming, or by `higher_is_better`; a warning too few hides a mistake."""
    metric = named("lossless_accuracy")
    assert warnings_of(lambda: Inputs(data=batches(1), metric=metric))
    metric.higher_is_better = True
    assert not warnings_of(lambda: Inputs(data=batches(1), metric=metric))


def test_the_metrics_of_the_lab_give_no_warning():
    assert not warnings_of(
        lambda: [Inputs(data=batches(1), metric=metric) for metric in (metrics.loss, metrics.accuracy)]
    )
    assert not warnings_of(lambda: Inputs(data=batches(1), loss=named("loss")))


def test_one_warning_points_at_the_caller():
    model = network()
    for run in (bnlab.check, bnlab.repair):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(model, data=batches(), metric=named("loss"))
        assert [(warning.category, warning.filename) for warning in caught] == [(BnlabWarning, __file__)]
