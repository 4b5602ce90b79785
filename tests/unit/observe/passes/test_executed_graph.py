"""The executed graph holds the calls that ran."""

import dataclasses

import pytest
import torch
from torch import nn

from bnlab.observe.passes.executed_graph import execute


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


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
