"""The reference backend, which accepts every request."""

import itertools

import pytest
import torch
from tests import oracle

from bnlab.kernels import Request
from bnlab.kernels.backends import reference


def test_it_refuses_nothing():
    for device, dtype, masked, count in itertools.product(
        ["cpu", "cuda"], ["float16", "float64"], [True, False], [0, 2]
    ):
        assert reference.refuse(Request(device, dtype, masked, count)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_formula(dtype):
    x, weight, bias = torch.randn(6, 3, 4).to(dtype), torch.randn(3), torch.randn(3)
    y, mean, var = reference.forward(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    assert mean.numpy() == pytest.approx(oracle.statistics(x)[0].astype(float))
    assert var.numpy() == pytest.approx(oracle.statistics(x)[1].astype(float))
