"""Training steps in CUDA graphs: every replay computes anew, and moves the running statistics."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.gpu import hardware as gpu
from tests.gpu.cases import assert_near, batch_of, expected_of, laid_out, layer_for
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("hardware")

SHAPES = {"fits on the chip": (4, 24, 14, 14), "7 by 7": (8, 64, 7, 7), "large": (16, 16, 112, 112), "n-c": (512, 100)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


class Step:
    """A forward and backward pass on tensors that stay at their place, as a graph needs it."""

    def __init__(self, shape, layout, device, *, dtype=torch.float32, training=True, **options):
        batch = batch_of(shape, dtype, residual=True)
        self.weight, self.bias = batch.weight, batch.bias
        self.layer = layer_for(batch, device, activation="relu", **options).train(training)
        for parameter in self.layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.x, self.residual, self.grad = (laid_out(t, layout, device) for t in (batch.x, batch.residual, batch.grad))
        self.x.requires_grad_()
        self.x.grad = torch.zeros_like(self.x)
        self.y = torch.empty_like(self.x)

    def __call__(self):
        for leaf in (self.x, self.layer.weight, self.layer.bias):
            leaf.grad.zero_()
        y = self.layer(self.x, self.residual)
        y.backward(self.grad)
        self.y.copy_(y.detach())

    def take(self, batch):
        with torch.no_grad():
            for own, other in ((self.x, batch.x), (self.residual, batch.residual), (self.grad, batch.grad)):
                own.copy_(other)


@shapes
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_replay_computes_anew(shape, layout, dtype, training, device):
    step = Step(shape, layout, device, dtype=dtype, training=training)
    plain = copy.deepcopy(step.layer)
    replay = gpu.captured(step, device)
    step.layer.load_state_dict(plain.state_dict())
    for seed in range(4):
        batch = batch_of(shape, dtype, ratio=seed, residual=True, seed=seed)
        step.take(batch)
        replay()
        x = step.x.detach().clone().requires_grad_()
        plain.zero_grad()
        y = plain(x, step.residual)
        y.backward(step.grad)
        for captured, eager in (
            (step.y, y),
            (step.x.grad, x.grad),
            (step.layer.weight.grad, plain.weight.grad),
            (step.layer.bias.grad, plain.bias.grad),
        ):
            assert_close(captured, eager.detach(), rtol=0, atol=0)
        assert_close(step.layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert step.layer.num_batches_tracked == 4 * training


@layouts
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_against_float64(layout, momentum, device):
    shape = SHAPES["fits on the chip"]
    step = Step(shape, layout, device, momentum=momentum)
    replay = gpu.captured(step, device)
    step.layer.reset_running_stats()
    mean, var = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()
    for number in range(1, 4):
        batch = batch_of(shape, torch.float32, residual=True, seed=number)
        batch = replace(batch, weight=step.weight, bias=step.bias)
        batch, expected = expected_of(batch, "relu")
        step.take(batch)
        replay()
        weight = 1 / number if momentum is None else momentum
        mean = (1 - weight) * mean + weight * expected.mean
        var = (1 - weight) * var + weight * expected.var * expected.count / (expected.count - 1)
        assert_near(step.x.grad, expected.dx, 1e-5)
    assert_close(step.layer.running_mean.cpu().double(), mean, rtol=1e-6, atol=1e-6)
    assert_close(step.layer.running_var.cpu().double(), var, rtol=1e-6, atol=1e-6)


@layouts
def test_a_replay_decides_anew_whether_a_batch_counts(layout, device):
    shape = SHAPES["fits on the chip"]
    step = Step(shape, layout, device)
    replay = gpu.captured(step, device)
    step.layer.reset_running_stats()
    good = batch_of(shape, torch.float32, residual=True)
    replay()
    before = copy.deepcopy(step.layer.state_dict())
    with torch.no_grad():
        step.x[0, 0, 0, 0] = float("nan")
    for count in (1, 2):
        replay()
        assert (step.layer.num_batches_tracked, step.layer.skipped_batches) == (1, count)
        assert_close(step.layer.state_dict(), before, rtol=0, atol=0)
    step.take(good)
    replay()
    assert (step.layer.num_batches_tracked, step.layer.skipped_batches) == (2, 2)


def test_two_graphs_of_layers_that_share_a_shape_replay_in_turn(device):
    """What programs of one launch agree on must neither stay in memory that a graph frees, nor count from 0."""
    steps = [Step((4, 24, 14, 14), "contiguous", device) for _ in range(2)]
    replays = [gpu.captured(step, device) for step in steps]
    for step, replay in zip(steps, replays, strict=True):
        step.layer.reset_running_stats()
        replay()
    results = [step.y.clone() for step in steps]
    for _ in range(3):
        for step in reversed(range(2)):
            replays[step]()
            steps[step].layer(steps[step].x.detach())  # an eager call between the replays
            assert torch.equal(steps[step].y, results[step])


def test_a_graph_replays_beside_another_stream(hardware):
    step = Step((16, 16, 112, 112), "contiguous", hardware)
    replay = gpu.captured(step, hardware)
    replay()
    first = step.y.clone(), step.x.grad.clone()
    stream = gpu.busy(hardware)
    for _ in range(5):
        replay()
        assert torch.equal(step.y, first[0])
        assert torch.equal(step.x.grad, first[1])
    torch.cuda.current_stream(hardware).wait_stream(stream)


def test_graphed_callables_of_torch(hardware):
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32), "relu")
    layer = layer_for(batch, hardware, activation="relu")
    net = torch.cuda.make_graphed_callables(layer, (batch.x.to(hardware).requires_grad_(),))
    layer.reset_running_stats()
    for number in (1, 2):
        x = batch.x.to(hardware).requires_grad_()
        layer.zero_grad()
        y = net(x)
        y.backward(batch.grad.to(hardware))
        assert_near(y.detach(), expected.y, 1e-6)
        assert_near(x.grad, expected.dx, 1e-5)
        assert_near(layer.weight.grad, expected.dweight, 1e-5)
        assert layer.num_batches_tracked == number
