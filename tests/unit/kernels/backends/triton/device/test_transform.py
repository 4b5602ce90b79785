"""BN as a scale and a shift with coefficients in float64."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device import transform
from bnlab.kernels.backends.triton.launching import pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@triton.jit
def _fold(values, results, high, low):
    at = tl.arange(0, 4)
    loaded = (tl.load(values + at), tl.load(values + 4 + at), tl.load(values + 8 + at), tl.load(values + 12 + at))
    parts = transform.folded(loaded[0], loaded[1], loaded[2], loaded[3], transform.from_parts(high, low))
    for index in tl.static_range(5):
        tl.store(results + 4 * index + at, parts[index].to(tl.float64))


def test_folded_coefficients_are_bn_in_any_unit():
    mean = torch.tensor([1234.567, 1e30, 0.1, -3.0], dtype=torch.float64)
    var = torch.tensor([2.0, 1e70, 1e-12, 0.0], dtype=torch.float64)
    weight = torch.tensor([1.5, -2.0, 1e35, 1.0], dtype=torch.float64)
    bias = torch.tensor([0.5, 1.0, 0.0, -1.0], dtype=torch.float64)
    results = torch.zeros(5, 4, dtype=torch.float64)
    _fold[(1,)](torch.stack([mean, var, weight, bias]), results, *pair(1e-5))
    unit, pivot, scale, shift, inv_std = results
    assert_close(inv_std, (var + 1e-5).rsqrt(), rtol=1e-15, atol=0)
    assert_close(unit, torch.tensor([1.0, 2.0**-64, 2.0**64, 1.0], dtype=torch.float64))
    assert bool(results.isfinite().all())
    x = mean + torch.tensor([1.0, 1e34, 1e-3, 0.5], dtype=torch.float64)
    expected = (x - mean) * inv_std * weight + bias
    assert_close((x * unit - pivot) * scale + shift, expected, rtol=1e-6, atol=1e-6)


@triton.jit
def _activate(values, weight, results, activation: tl.constexpr):
    at = tl.arange(0, 4)
    y = tl.load(values + at)
    exists = at < 3
    tl.store(results + at, transform.activated(y, activation, 0.25))
    tl.store(results + 4 + at, transform.passes(y).to(tl.float32))
    tl.store(results + 8 + at, transform.parameter(weight, at, exists, 7.0).to(tl.float32))


@pytest.mark.parametrize(("activation", "below"), [(0, -2.0), (1, 0.0), (2, -0.5)])
def test_activations_pass_nan_and_absent_parameters_are_constants(activation, below):
    results = torch.zeros(3, 4)
    _activate[(1,)](torch.tensor([-2.0, 0.0, 3.0, torch.nan]), None, results, activation)
    assert_close(results[0], torch.tensor([below, 0.0, 3.0, torch.nan]), equal_nan=True)
    assert results[1].tolist() == [0, 0, 1, 1]
    assert results[2].tolist() == [7, 7, 7, 7]
    _activate[(1,)](torch.zeros(4), torch.tensor([1.0, 2.0, 3.0]), results, activation)
    assert results[2].tolist() == [1, 2, 3, 7]
