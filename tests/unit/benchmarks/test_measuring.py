"""What the benchmarks share: times are those of one call, sides take turns, and the shapes are those of ResNet-50."""

import numpy as np
import pytest
import torch
from benchmarks.measuring import exact, resnet50, steps, timing
from torch import nn


def test_the_geometric_mean_weighs_twice_and_half_alike():
    assert timing.geometric_mean([2.0, 0.5]) == pytest.approx(1)
    assert timing.geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2)


def test_sides_take_turns():
    order = []
    readings = {side: lambda side=side: float(order.append(side) or len(order)) for side in "ab"}
    assert timing.alternating(readings, 2) == {"a": [1, 3], "b": [2, 4]}
    assert timing.medians({"a": [1, 9, 2]}) == {"a": 2}


def test_a_reading_is_the_mean_of_timed_calls_after_an_untimed_one(monkeypatch):
    now = [0.0]
    lengths = iter([100.0, 1.0, 3.0])

    def step():
        now[0] += next(lengths)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.wall(step, calls=2)() == pytest.approx(2)


def test_the_network_has_the_layers_of_resnet50_and_the_activations_that_are_measured():
    inputs = set()
    model = resnet50.resnet50(resnet50.classifier()).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.add((args[0].size(1), 7 * args[0].size(3))))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)  # a seventh of 224
    assert len(layers) == 53
    assert set(resnet50.BN_ACTIVATIONS) <= inputs


@pytest.mark.parametrize("side", resnet50.SIDES)
def test_a_training_step_moves_parameters_and_statistics(side):
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model = resnet50.network_for(x, side, (1,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resnet50.training_step(model, x, torch.bfloat16)()
    after = model.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before if not name.endswith("skipped_batches"))
    classes = {type(module).__module__.split(".")[0] for module in model.modules() if hasattr(module, "running_mean")}
    assert classes == {"torch" if side == "torch" else "bnlab"}


def test_a_step_gives_the_gradients_of_every_input():
    x, residual, grad = torch.randn(3, 4, 2, 5, 5).unbind()
    x.requires_grad_(), residual.requires_grad_()
    layer = steps.batch_norm(nn, 4, 2)
    forward = steps.torch_forward(layer, activation="relu", in_place=True)
    dx, dresidual, dweight, dbias = steps.forward_and_backward(forward, x, residual, grad, list(layer.parameters()))()
    passes = (layer(x) + residual > 0).float()
    torch.testing.assert_close(dresidual, grad * passes)
    torch.testing.assert_close(dbias, (grad * passes).sum((0, 2, 3)))
    assert dx.shape == x.shape
    assert dweight.shape == (2,)


def test_the_unit_of_an_error_grows_with_the_output():
    expected = np.array([[[[4.0]]]], np.longdouble)
    off_by_one_eps = torch.full((1, 1, 1, 1), 4 + 4 * torch.finfo(torch.float32).eps)
    assert exact.error(off_by_one_eps, expected) == pytest.approx(1)


def test_the_exact_output_is_that_of_a_shifted_input():
    x = exact.shifted((4, 2, 3, 3), torch.float32, 1e2)
    normalised = torch.from_numpy(exact.exact(x).astype(np.float64))
    double = x.double()
    torch.testing.assert_close(normalised, nn.functional.batch_norm(double, None, None, training=True))
    assert x.mean() == pytest.approx(100, abs=1)
