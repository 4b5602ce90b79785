from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bnlab.functional import Moments, batch_moments, merge, population_moments
from bnlab.functional.moments import moments_in_blocks

values = st.floats(-1e6, 1e6, width=32)
columns = st.lists(values, min_size=1, max_size=12)


def column(numbers, device):
    return torch.tensor(numbers, dtype=torch.float32, device=device).reshape(-1, 1)


def exact(numbers):
    """Mean and sum of squared deviations in rational arithmetic."""
    parts = [Fraction(number) for number in numbers]
    mean = sum(parts) / len(parts)
    return float(mean), float(sum((part - mean) ** 2 for part in parts))


@given(columns)
def test_moments_are_those_of_rational_arithmetic(device, numbers):
    moments = batch_moments(column(numbers, device))
    mean, m2 = exact(column(numbers, device).flatten().tolist())
    assert moments.count == len(numbers)
    assert moments.mean.item() == pytest.approx(mean, rel=1e-12, abs=1e-9)
    assert moments.m2.item() == pytest.approx(m2, rel=1e-9, abs=1e-9)


def test_the_oracle_catches_one_pass_moments(device):
    numbers = [1e6 + 0.01 * i for i in range(8)]
    x = column(numbers, device)
    _, m2 = exact(x.flatten().tolist())
    one_pass = (x.square().mean() - x.mean().square()).item() * 8
    assert one_pass != pytest.approx(m2, rel=1e-3)
    assert batch_moments(x).m2.item() == pytest.approx(m2, rel=1e-9)


@given(columns, st.integers(-1000, 1000))
def test_a_shift_moves_the_mean_and_nothing_else(device, numbers, shift):
    x = column([round(number) for number in numbers], device)
    before, after = batch_moments(x.double()), batch_moments(x.double() + shift)
    assert_close(after.mean, before.mean + shift)
    assert_close(after.m2, before.m2, rtol=1e-9, atol=1e-6)


@given(columns, st.sampled_from([0.5, -2.0, 1024.0]))
def test_a_scale_scales(device, numbers, scale):
    before, after = (batch_moments(column(numbers, device).double() * factor) for factor in (1, scale))
    assert torch.equal(after.mean, before.mean * scale)
    assert_close(after.m2, before.m2 * scale**2, rtol=1e-12, atol=0)


@given(st.lists(columns, min_size=1, max_size=6), st.randoms())
def test_merging_in_any_order_equals_one_batch(device, batches, random):
    parts = [batch_moments(column(numbers, device)) for numbers in batches]
    random.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    whole = batch_moments(torch.cat([column(numbers, device) for numbers in batches]))
    assert_close((merged.count, merged.mean), (whole.count, whole.mean), rtol=1e-10, atol=1e-8)
    assert_close(merged.m2, whole.m2, rtol=1e-8, atol=1e-6)


def test_an_empty_batch_merges_as_nothing(device):
    part, nothing = batch_moments(torch.randn(5, 3).to(device)), batch_moments(torch.empty(0, 3, device=device))
    assert (nothing.count, nothing.mean.tolist(), nothing.m2.tolist()) == (0, [0] * 3, [0] * 3)
    for merged in (merge(part, nothing), merge(nothing, part)):
        assert_close((merged.count, merged.mean, merged.m2), (part.count, part.mean, part.m2))
    assert merge(nothing, nothing).count == 0


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_a_huge_mean_with_a_tiny_variance(mean, device):
    x = (mean + 1e-3 * torch.randn(1000, 2, dtype=torch.float64)).to(device)
    assert_close(batch_moments(x).var, x.var(0, unbiased=False), rtol=1e-6, atol=0)


def test_float32_up_to_the_largest_does_not_overflow(device):
    x = torch.tensor([[3e38], [-3e38], [1e38]], device=device)
    moments = batch_moments(x)
    mean, m2 = exact(x.flatten().tolist())
    assert moments.mean.item() == pytest.approx(mean)
    assert moments.m2.item() == pytest.approx(m2)


def test_count_one_and_a_constant_channel(device):
    one = batch_moments(torch.tensor([[7.0]], device=device))
    assert (one.mean.item(), one.m2.item(), one.var.item(), one.unbiased_var.item()) == (7, 0, 0, 0)
    assert (batch_moments(torch.full((64, 3, 5), 0.1, device=device)).m2 == 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_that_are_not_finite_stay_in_their_channel(bad, device):
    x = torch.randn(6, 3).to(device)
    x[2, 1] = bad
    moments = batch_moments(x)
    assert torch.isfinite(moments.mean).tolist() == [True, False, True]
    assert torch.isfinite(moments.m2).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_a_mask_equals_the_values_it_leaves(shape, device):
    x, keep = torch.randn(shape).to(device), torch.rand(shape[0], 1, *shape[2:]).to(device) > 0.4
    masked = batch_moments(x.masked_fill(~keep, float("nan")), keep)
    kept = x.movedim(1, -1)[keep.movedim(1, -1).squeeze(-1)]
    expected = batch_moments(kept)
    assert_close((masked.count, masked.mean, masked.m2), (expected.count, expected.mean, expected.m2))


def test_a_weight_of_two_equals_the_value_twice(device):
    x, weights = torch.randn(5, 2).to(device), torch.tensor([1.0, 2, 1, 0, 3], device=device).reshape(5, 1)
    weighted = batch_moments(x, weights)
    expected = batch_moments(x.repeat_interleave(weights.flatten().long(), 0))
    assert_close((weighted.count, weighted.mean, weighted.m2), (expected.count, expected.mean, expected.m2))


@pytest.mark.parametrize("shape", [(3, 2, 700, 700), (5, 3), (0, 3)])
def test_blocks_equal_the_whole_batch(shape, device):
    x = (1e3 + torch.randn(shape)).to(device)
    mask = torch.rand(shape[0], 1, *shape[2:]).to(device) > 0.5
    for own, whole in (
        (moments_in_blocks(x), batch_moments(x)),
        (moments_in_blocks(x, mask), batch_moments(x, mask)),
    ):
        assert torch.equal(own.count, whole.count)
        assert_close(own.mean, whole.mean, rtol=1e-13, atol=0)
        assert_close(own.m2, whole.m2, rtol=1e-10, atol=0)
    if len(x) > 1:
        assert not torch.equal(moments_in_blocks(x, mask).mean, batch_moments(x, ~mask).mean)


def test_population_estimators(device):
    batches = [(10 * i + torch.randn(n, 3)).to(device) for i, n in enumerate((64, 64, 64, 4))]
    parts = [batch_moments(batch) for batch in batches]
    everything = torch.cat(batches).double()
    assert_close(population_moments(parts), (everything.mean(0), everything.var(0)))
    mean, var = population_moments(parts, "within-batch")
    assert_close(mean, everything.mean(0))
    by_count = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)[:, None].to(device) / len(
        everything
    )
    assert_close(var, (by_count * torch.stack([batch.double().var(0) for batch in batches])).sum(0))
    assert (var < everything.var(0) / 10).all()


def test_moments_are_differentiable(device):
    x = torch.randn(4, 2, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_moments(x).var, x)
    assert isinstance(batch_moments(x), Moments)
