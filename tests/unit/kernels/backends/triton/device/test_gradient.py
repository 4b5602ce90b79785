"""The sums of the gradients, and what becomes of them."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.functional import batch_norm_backward
from bnlab.kernels.backends.triton.device.gradient import backward_kernel, gradient_sums_kernel, merge_sums_kernel
from bnlab.kernels.backends.triton.geometry import geometry_of, merging_form
from bnlab.kernels.backends.triton.launching import pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


def batch():
    x, dy = torch.randn(20, 9) + 2, torch.randn(20, 9)
    moments = torch.stack([x.double().mean(0), x.double().var(0, correction=0)])
    return x, dy, moments, torch.randn(9), torch.randn(9)


def test_parts_of_the_sums_merge_to_the_gradients_of_the_parameters():
    x, dy, moments, weight, bias = batch()
    weights = torch.rand(20, 1)
    geometry = geometry_of(x, 64)
    form = geometry.form(64, 2, 8)._replace(height=4)
    parts = torch.full((3, 3, 9), torch.nan, dtype=torch.float64)
    tensors = (dy, x, None, weights, moments, weight, bias, parts, None, None)
    gradient_sums_kernel[(3 * geometry.groups,)](*tensors, 20, 9, 8, 3, *pair(1e-5), 0.25, form, 2)
    normal = (x - moments[0]) / (moments[1] + 1e-5).sqrt()
    gradient = torch.where(normal * weight + bias > 0, dy, dy * 0.25).double()
    deviation = x.double() - moments[0].float().double()
    for index, rows in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        sums = [gradient, gradient * deviation, weights.double().expand(20, 9)]
        assert_close(parts[:, index], torch.stack([part[rows].sum(0) for part in sums]), rtol=1e-5, atol=1e-5)
    whole, dweight, dbias = torch.zeros(3, 9, dtype=torch.float64), torch.zeros(9), torch.zeros(9, dtype=torch.float64)
    merging = merging_form(64)
    tensors = (parts, whole, moments, weight, bias, dweight, dbias)
    merge_sums_kernel[(-(-9 // merging.side),)](*tensors, 9, 3, *pair(1e-5), 3, merging)
    assert_close(whole, parts.sum(1))
    assert_close(dweight.double(), (gradient * normal).sum(0), rtol=1e-5, atol=1e-5)
    assert_close(dbias, gradient.sum(0), rtol=1e-5, atol=1e-5)


def test_one_launch_computes_all_gradients_of_all_groups():
    x, dy, moments, weight, bias = batch()
    geometry = geometry_of(x, 64)
    form = geometry.form(64, 1, 8)._replace(height=16, tiles=2)
    dx, dweight, dbias = torch.zeros_like(x), torch.zeros(9), torch.zeros(9)
    tensors = (dy, x, None, moments, weight, bias, None, None, dx, None, dweight, dbias)
    groups = geometry.groups
    backward_kernel[(groups,)](*tensors, 20, 9, groups, 1, groups, 20, *pair(1e-5), 0.0, form, 0, True)
    expected = batch_norm_backward(dy, x, weight, 1e-5)
    assert_close((dx, dweight.double(), dbias.double()), expected, rtol=1e-4, atol=1e-5)
