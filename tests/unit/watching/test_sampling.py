import numpy as np
import pytest
import torch
from torch import nn

from bnlab.observe.training_run import beyond_noise
from bnlab.observe.transfers import Pending
from bnlab.watching.sampling import Sampler, is_sampled


def test_two_consecutive_steps_of_every_hundred_are_sampled():
    assert [step for step in range(250) if is_sampled(step, 100)] == [0, 1, 100, 101, 200, 201]
    assert all(is_sampled(step, 1) for step in range(5))
    assert all(is_sampled(step, 2) for step in range(5))


def moments(x):
    x = x.double().numpy()
    return x.mean((0, 2)), x.var((0, 2), ddof=1)


@pytest.mark.parametrize("momentum", [0.1, 0.4])
def test_a_sample_compares_two_batches_with_the_running_statistics_before_the_second(momentum):
    layer = nn.BatchNorm1d(3, momentum=momentum, eps=1e-3)
    sampler, samples = Sampler(Pending()), []
    first, second = (torch.randn(40, 3, 5) * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1) + shift for shift in (0, 2))
    layer(first)
    sampler.add(0, layer, first, samples.append, is_fresh=False)
    mean, var = layer.running_mean.double().numpy().copy(), layer.running_var.double().numpy().copy()
    layer(second)
    sampler.add(1, layer, second, samples.append, is_fresh=False)
    (sample,) = samples
    (mean_1, var_1), (mean_2, var_2) = moments(first), moments(second)
    scale = var_2 + 1e-3
    assert sample.step == 1
    assert sample.noise == pytest.approx(((mean_2 - mean_1) ** 2 / scale).mean() / 2, rel=1e-4)
    assert sample.lag == pytest.approx(((mean_2 - mean) ** 2 / scale).mean(), rel=1e-3)
    assert sample.log_noise == pytest.approx(((np.log(scale) / 2 - np.log(var_1 + 1e-3) / 2) ** 2).mean() / 2, rel=1e-3)
    after = layer.running_mean.double().numpy()
    wrong = ((mean_2 - after) ** 2 / scale).mean()  # what forgets that the update has taken a share away
    assert sample.lag != pytest.approx(wrong, rel=0.05)
    assert sample.running_mean == pytest.approx(np.sqrt((after**2).mean()), rel=1e-5)
    assert var is not None


def test_batches_that_are_not_consecutive_are_no_pair():
    layer, sampler, samples = nn.BatchNorm1d(3), Sampler(Pending()), []
    for step in (0, 2, 4):
        sampler.add(step, layer, torch.randn(8, 3), samples.append, is_fresh=True)
    assert samples == []


def test_a_settled_average_of_stationary_batches_shows_no_drift():
    torch.manual_seed(3)
    layer, sampler, samples = nn.BatchNorm1d(256, momentum=0.1), Sampler(Pending()), []
    for step in range(120):
        x = torch.randn(16, 256)
        layer(x)
        if step >= 60:
            sampler.add(step, layer, x, samples.append, is_fresh=True)
    drifts = [sample.drift for sample in samples]
    assert np.median(drifts) < 0.1
    assert np.median([sample.lag for sample in samples]) ** 0.5 > 0.2  # what noise alone does


def test_statistics_that_move_by_a_constant_lag_by_what_the_formula_says():
    torch.manual_seed(3)
    layer, sampler, samples = nn.BatchNorm1d(256, momentum=0.1), Sampler(Pending()), []
    for step in range(120):
        x = torch.randn(64, 256) + 0.1 * step
        layer(x)
        if step >= 80:
            sampler.add(step, layer, x, samples.append, is_fresh=True)
    lag = 0.1 / 0.1  # the mean moves by d a step, and stands d/a behind before the update
    assert np.median([sample.drift for sample in samples]) == pytest.approx(lag, rel=0.05)


def test_a_layer_in_eval_mode_is_sampled_as_it_stands():
    layer, sampler, samples = nn.BatchNorm1d(3).eval(), Sampler(Pending()), []
    for step in range(2):
        x = torch.randn(64, 3) + 2
        layer(x)
        sampler.add(step, layer, x, samples.append, is_fresh=True)
    (sample,) = samples
    assert not sample.updated
    mean, var = x.double().mean(0), x.double().var(0) + 1e-5
    assert sample.lag == pytest.approx(float((mean**2 / var).mean()), rel=1e-4)


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_the_initial_values_of_a_new_layer_are_no_lag(momentum):
    torch.manual_seed(3)
    layer, sampler, samples = nn.BatchNorm1d(256, momentum=momentum), Sampler(Pending()), []
    for step in range(60):
        x = 3 * torch.randn(32, 256) + 5
        layer(x)
        sampler.add(step, layer, x, samples.append, is_fresh=True)
    assert np.median([sample.drift for sample in samples[20:]]) < 0.05
    assert beyond_noise(samples[20:]) == pytest.approx(1, abs=0.1)
    weights = momentum * (1 - momentum) ** np.arange(59)  # of the batches before the last one
    assert samples[-1].running_noise == pytest.approx((weights**2).sum() / weights.sum() ** 2, rel=1e-6)
