"""The steps of a backend of fused kernels, here with the kernels of the CPU."""

import numpy as np
import pytest
import torch
from tests import oracle

from bnlab.kernels import fused, native
from bnlab.kernels.native import calls

here = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")

EPS = 1e-5


def sample(layout):
    x, dy = (oracle.LAYOUTS[layout](torch.randn(4, 3, 5, 6) + 2) for _ in range(2))
    return x, dy, torch.rand(3) + 0.5, torch.randn(3)


@here
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_forward_and_backward_agree_with_the_formulas(layout):
    x, dy, weight, bias = sample(layout)
    y, mean, var = fused.forward(calls, x, weight, bias, None, EPS)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias, EPS)) < 4
    dx, dweight, dbias = fused.backward(calls, dy, x, weight, None, mean, var, EPS)
    assert oracle.error_in_eps(dx, oracle.backward(dy, x, weight, EPS)) < 4
    x_hat = oracle.batch_norm(x, eps=EPS)
    grad = dy.double().numpy()
    np.testing.assert_allclose(dweight.numpy(), (grad * x_hat).sum((0, 2, 3)).astype(float), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbias.numpy(), grad.sum((0, 2, 3)), rtol=1e-5)


@here
def test_a_gradient_in_another_layout_and_dtype_is_taken_as_that_of_the_output():
    x, dy, weight, bias = sample("channels_last")
    _, mean, var = fused.forward(calls, x, weight, bias, None, EPS)
    expected = fused.backward(calls, dy, x, weight, None, mean, var, EPS)
    actual = fused.backward(calls, dy.contiguous().double(), x, weight, None, mean, var, EPS)
    assert all(torch.equal(*parts) for parts in zip(actual, expected, strict=True))


@here
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_a_mask_counts_its_positions_alone(layout):
    x, dy, weight, bias = sample(layout)
    mask = torch.zeros(4, 1, 5, 6)
    mask[:2] = 1
    y, mean, var = fused.forward(calls, x, weight, bias, mask, EPS)
    assert oracle.error_in_eps(y[:2], oracle.batch_norm(x[:2], weight, bias, EPS)) < 4
    dy[2:] = 0  # what the mask leaves out then has no effect, and the batch is its first two samples
    dx, *_ = fused.backward(calls, dy, x, weight, mask, mean, var, EPS)
    assert oracle.error_in_eps(dx[:2], oracle.backward(dy[:2], x[:2], weight, EPS)) < 4
    assert not dx[2:].any()


@here
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_statistics_and_the_sum_of_the_weights(layout):
    x, *_ = sample(layout)
    mask = torch.zeros(4, 1, 1, 1)
    mask[1:] = 0.5
    for part, weights, count in ((x, None, 120), (x[1:], mask, 45)):
        mean, var, total = fused.statistics(calls, x, weights)
        expected = oracle.statistics(part)
        np.testing.assert_allclose(mean.numpy(), expected[0].astype(float), rtol=1e-6)
        np.testing.assert_allclose(var.numpy(), expected[1].astype(float), rtol=1e-6)
        assert (mean.dtype, float(total)) == (torch.float64, count)


def test_the_dtypes_have_names():
    assert fused.names_of_dtypes() == ("float32", "bfloat16", "float16")
