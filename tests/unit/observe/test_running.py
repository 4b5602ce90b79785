"""Running a model to see what it does: batches, the executed graph, and no trace left."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnlab.observe.passes.batches import run_batch, samples_in, tensors_in
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.subject import untouched


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


def test_batches_of_every_form():
    x, y = torch.ones(2), torch.zeros(2)
    double = nn.Module()
    double.forward = lambda x: 2 * x
    for batch in (x, (x, y), [x, y], {"x": x}, ({"x": x}, y)):
        assert torch.equal(run_batch(double, batch), 2 * x)
    assert samples_in((x, y)) == 2
    assert tensors_in({"a": [x, (y, Output(x))], "b": "text"}) == [x, y, x]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.later = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 4)
        self.first = nn.BatchNorm1d(4)
        self.unused = nn.BatchNorm1d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.first(x)
        size = h.shape[0]
        h += x
        h = self.act(h)
        h = self.later(self.fc(h))
        return Output(h.reshape(size, -1))


def test_the_graph_is_what_ran_not_what_was_registered():
    model, x = Branching(), torch.randn(3, 4)
    graph = execute(model, x)
    (first,), (later,) = graph.of_layer("first"), graph.of_layer("later")
    assert graph.of_layer("unused") == []
    assert graph.producer(first.inputs[0].id) is None
    (addition,) = graph.consumers(first.outputs[0].id)
    assert addition.function.__name__ == "add_"
    (relu,) = graph.consumers(addition.outputs[0].id)
    assert relu.modules == ("", "act")
    linear = graph.producer(later.inputs[0].id)
    assert linear.modules == ("", "fc")
    assert linear.inputs[0] == relu.outputs[0]
    (reshape,) = graph.consumers(later.outputs[0].id)
    assert reshape.outputs[0].id in graph.kept
    assert later.inputs[0].shape == (3, 4)


def test_the_graph_of_a_model_that_raises_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        execute(model, torch.randn(2, 2, 2, 4))
    assert execute(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(2, 4)).of_layer("0")
    handles = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    assert not any(handles)


def test_untouched_puts_everything_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()
    model.calls = 0
    buffers = dict(model.named_buffers())
    values = {key: value.clone() for key, value in buffers.items()}
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)

    def disturb():
        model.train()
        model(torch.randn(4, 3))
        model[0].running_var = None
        model.calls += 1
        model[0].cache = model.calls
        random.random(), np.random.rand()
        raise RuntimeError

    with pytest.raises(RuntimeError), untouched(model):
        disturb()
    assert [m.training for m in model] == [False, True]
    assert model.calls == 0
    assert not hasattr(model[0], "cache")
    assert all(value is buffers[key] for key, value in model.named_buffers())
    assert_close(dict(model.named_buffers()), values, rtol=0, atol=0)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_buffers_that_are_not_a_number_are_put_back_too():
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(float("nan"))
    with untouched(model):
        model.running_mean.zero_()
    assert model.running_mean.isnan().all()
