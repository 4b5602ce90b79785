import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bnlab.functional import (
    debias,
    effective_batches,
    moving_average,
    updates_to_forget,
)


@given(st.floats(0, 1), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_an_update_is_a_weighted_mean(device, momentum, old, new):
    updated = moving_average(*torch.tensor([[old], [new]], dtype=torch.float64, device=device), momentum)
    assert updated.item() == pytest.approx((1 - momentum) * old + momentum * new, rel=1e-9, abs=1e-9)


def test_momentum_none_is_the_plain_average(device):
    running = torch.zeros(1, dtype=torch.float64, device=device)
    values = torch.randn(20, dtype=torch.float64).to(device)
    for update, value in enumerate(values, start=1):
        running = moving_average(running, value.reshape(1), None, update)
    assert_close(running[0], values.mean())


def test_a_value_the_buffer_cannot_hold_saturates(device):
    updated = moving_average(
        torch.ones(1, device=device), torch.tensor([1e300], dtype=torch.float64, device=device), 1.0
    )
    assert updated.item() == torch.finfo(torch.float32).max


def test_debiasing_takes_the_initial_values_out(device):
    mean, var = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device)
    for _ in range(7):
        mean, var = moving_average(mean, mean.new_tensor([5.0]), 0.1), moving_average(var, var.new_tensor([4.0]), 0.1)
    assert mean.item() < 3
    assert_close(debias(mean, var, 0.1, 7), (mean.new_tensor([5.0]), mean.new_tensor([4.0])))


@pytest.mark.parametrize(("momentum", "updates"), [(0.1, 43.7), (0.01, 458.2), (0.001, 4602.9)])
def test_updates_to_forget(momentum, updates):
    assert updates_to_forget(momentum) == pytest.approx(updates, abs=0.1)
    assert (1 - momentum) ** updates_to_forget(momentum) == pytest.approx(0.01)


def test_effective_batches_by_simulation(device):
    noise = torch.randn(4000, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, running = noise.to(device), torch.zeros(3000, dtype=torch.float64, device=device)
    for row in noise[:200]:
        running = moving_average(running, row, 0.1)
    assert 1 / running.var().item() == pytest.approx(effective_batches(0.1), rel=0.1)
