"""The metric under each choice of statistics, its error, and the layers that lower it."""

import math

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.metric import Measured, measured
from bnlab.observe.model import read_model
from bnlab.observe.passes.batches import keep
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.survey import Inputs, survey


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
    return survey(model, states, Inputs(data=data, metric=agreement, **options))


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
    causal = evidence(network(*stale), batches()).causal
    assert {name for name, _ in causal} == {str(index) for index in stale}
    assert causal[-1][1] > 0.9


def test_nothing_is_named_where_nothing_is_lost():
    seen = evidence(network(), batches())
    assert seen.causal == ()
    assert seen.numbers.eval_running > 0.9


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

    result = measured(network(), needs_two, keep("data", batches(), "auto"))
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
        measured(network(), broken, keep("data", batches(1), "auto"))
