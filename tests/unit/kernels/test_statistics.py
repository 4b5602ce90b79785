"""The statistics of a batch are exact on whichever kernel computes them, and those beside the output are the same."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.kernels import native
from bnlab.kernels.statistics import batch_statistics, normalized_with_statistics

KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
WITHOUT_KERNEL = pytest.mark.parametrize("has_kernel", [True, False])


@KINDS
@WITHOUT_KERNEL
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_those_of_float64(dtype, has_kernel, masked, monkeypatch):
    if not has_kernel:
        monkeypatch.setattr(native, "refuse", lambda request: "not here")
    x = (1e3 + torch.randn(6, 3, 4, 5)).to(dtype)
    mask = (torch.rand(6, 1, 4, 5) > 0.4) if masked else None
    values = x.double().movedim(1, 0).flatten(1)
    values = values if mask is None else values[:, mask.flatten()]
    mean, var, total = batch_statistics(x, mask)
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(var, values.var(1, correction=0), rtol=1e-7, atol=0)
    assert float(total) == values.size(1)
    assert not torch.allclose(var, values.var(1), rtol=1e-7)  # the unbiased variance is a wrong answer


@KINDS
def test_the_output_is_bn_and_its_statistics_are_those_of_the_batch(dtype):
    x, weight, bias = (1 + torch.randn(6, 3, 4, 5)).to(dtype), torch.rand(3), torch.randn(3)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    y, mean, var = normalized_with_statistics(x, weight, bias, 1e-5)
    expected = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max())
    )
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0))
