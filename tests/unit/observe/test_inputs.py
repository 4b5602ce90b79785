"""What a caller passes to observe a model."""

import pytest
import torch
from torch import nn

from bnlab.errors import BnlabWarning, UsageError
from bnlab.observe.inputs import Inputs

DATA = [(torch.full((2, 3), float(index)), torch.zeros(2, dtype=torch.int64)) for index in range(3)]


def validation_loss(model, data):
    return 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": validation_loss}, r"^check: data must be given with train_data, metric or loss, got none\.$"),
        ({"train_data": DATA}, r"^check: data must be given"),
        ({"data": DATA, "loss": 3}, r"^loss: it must be callable, got int\.$"),
        ({"data": DATA, "metric": 3}, r"^metric: it must be callable, got int\.$"),
        ({"data": DATA, "metric": "acuracy"}, r"Did you mean 'accuracy'\?$"),
        ({"data": iter(DATA)}, r"^data: it must be an iterable that can be run through again"),
        ({"data": DATA, "train_data": 3}, r"^train_data: it must be an iterable of batches, got int\.$"),
        ({"data": DATA, "forward": 3}, r"^check: forward must be callable, got int\.$"),
        ({"data": DATA, "max_batches": 0}, r"^max_batches: value must be"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        Inputs(**arguments)


def test_each_data_set_is_read_once_and_the_example_is_one_batch():
    passes = []

    def stream():
        passes.append(1)
        yield from DATA

    inputs = Inputs(data=stream, example=[DATA[2], DATA[1]], max_batches=2).read()
    assert len(passes) == 1
    assert [float(x[0, 0]) for x, _ in inputs.data] == [0.0, 1.0]
    assert inputs.example is DATA[2]
    assert inputs.read().data is inputs.data


def test_the_example_is_the_first_batch_of_the_data_unless_there_is_one():
    assert Inputs().example_or_first_batch is None
    assert Inputs(data=DATA).example_or_first_batch is DATA[0]
    assert Inputs(data=DATA, example=DATA[1]).example_or_first_batch is DATA[1]


def test_the_score_is_the_metric_or_else_the_mean_loss():
    assert Inputs(data=DATA).score is None
    loss = Inputs(data=DATA, loss=lambda model, batch: batch[0].mean()).score
    assert (loss.name, loss.lower_is_better, loss.on(nn.Identity(), DATA)) == ("loss", True, 1.0)
    named = Inputs(data=DATA, metric=validation_loss, lower_is_better=True, loss=lambda model, batch: 0.0).score
    assert (named.name, named.lower_is_better, named.on(nn.Identity(), DATA)) == ("validation_loss", True, 2.0)


def test_a_metric_whose_name_says_that_lower_is_better_is_warned_of_once():
    with pytest.warns(BnlabWarning, match="validation_loss is read as higher is better"):
        inputs = Inputs(data=DATA, metric=validation_loss)
    inputs.read()  # a second warning would be an error
    Inputs(data=DATA, metric=validation_loss, lower_is_better=True)
