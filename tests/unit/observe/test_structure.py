"""The surroundings of a layer are read from the executed calls."""

import torch
from tests.architectures import build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bnlab.observe.discover import any_batch_norm
from bnlab.observe.evidence import Pruned
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.structure import executions


def seen(model, x):
    layers = any_batch_norm(model)
    return executions(model, execute(model.eval(), x, layers.values()), layers)


def test_a_resnet():
    executed = seen(build("resnet"), images(4))
    assert [*executed][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    first = executed["bn1"]
    assert (first.calls, first.samples, first.counts) == (1, 4, (4 * 16 * 16,))
    assert (first.producer.name, first.producer.has_bias, first.producer.feeds_only_this) == ("conv1", False, True)
    assert (first.features.axis, first.features.producer) == (1, "conv1")
    assert executed["layer2.0.downsample.1"].producer.name == "layer2.0.downsample.0"


def test_the_norms_of_the_filters_come_with_the_producer():
    model = build("resnet")
    executed = seen(model, images(4))
    expected = model.conv1.weight.detach().flatten(1).norm(dim=1)
    assert torch.allclose(torch.tensor(executed["bn1"].producer.filter_norms), expected.double())
    on_another_axis = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    (execution,) = seen(on_another_axis, torch.randn(3, 5, 6)).values()
    assert execution.producer.filter_norms is None
    (execution,) = seen(on_another_axis, torch.randn(3, 6)).values()
    assert len(execution.producer.filter_norms) == 5


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.off = nn.Dropout(0.0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.sequence = nn.BatchNorm1d(5)

    def forward(self, x):
        a = self.bn1(self.fc1(self.off(x)))
        y = self.fc2(F.relu(self.drop(torch.sigmoid(a))))
        b = self.bn2(y) + y
        c = self.bn3(self.fc3(torch.tanh(b)))
        self.sequence(self.fc3(c).unsqueeze(1).expand(-1, 5, -1))
        return self.bn3(c)


def test_producers_dropout_activations_and_calls():
    executed = seen(Odd(), torch.randn(7, 6))
    assert [*executed] == ["bn1", "bn2", "bn3", "sequence"]
    assert (executed["bn1"].dropout, executed["bn2"].dropout, executed["bn3"].dropout) == (None, "drop", "drop")
    assert (executed["bn1"].activation, executed["bn2"].activation) == ("sigmoid", None)
    assert [executed[name].producer.feeds_only_this for name in ("bn1", "bn2", "bn3")] == [True, False, True]
    assert (executed["bn3"].calls, executed["bn3"].counts) == (2, (7, 7))
    assert executed["sequence"].producer is None


def test_a_linear_layer_before_positions_is_on_another_axis():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(5))
    (execution,) = seen(model, torch.randn(3, 5, 6)).values()
    assert not execution.producer.same_axis
    assert (execution.features.axis, execution.features.producer) == (2, "0")


def test_pruned_channels_are_those_of_the_input_of_each_layer():
    model = build("resnet")
    with torch.no_grad():
        model.conv1.weight[[1, 4]] = 0
    executed = seen(model, images(4))
    assert executed["bn1"].pruned == Pruned((1, 4), ("conv1",))
    assert [name for name, execution in executed.items() if execution.pruned is not None] == ["bn1"]


def test_functional_dropout():
    class Functional(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.bn, self.p = nn.BatchNorm1d(4), p

        def forward(self, x):
            return self.bn(F.dropout(x, self.p, self.training))

    assert seen(Functional(0.3), torch.randn(3, 4))["bn"].dropout == ""
    assert seen(Functional(0.0), torch.randn(3, 4))["bn"].dropout is None
