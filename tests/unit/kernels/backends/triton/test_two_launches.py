"""Two launches and the third that merges, on the same tensors as one launch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.kernels.backends.triton import calls
from bnlab.kernels.backends.triton.plan import Machine
from bnlab.kernels.form import Running, form_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")

ONE = Machine(1, cooperative=False, tile=128)


def step(x, dy):
    """Return what a forward and a backward pass compute, with the buffers that they moved."""
    form = form_of(True, 1e-5, "relu", added=False)
    buffers = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), torch.tensor(0))
    y, moments, _, _ = calls.train(x, None, None, None, form, running=buffers, momentum=-1.0, skip_nonfinite=True)
    dx, _, dweight, dbias = calls.backward(dy, x, moments, None, None, form)
    return y, moments, *buffers, dx, dweight, dbias


def test_one_launch_two_and_three_compute_the_same(on):
    x, dy = torch.randn(2, 6, 5).unbind()
    names = on(ONE)
    at_once = step(x, dy)
    assert names == ["train_kernel", "backward_kernel"]
    names = on(ONE, in_two=True)
    in_two = step(x, dy)
    assert names == ["statistics_kernel", "normalise_kernel", "gradient_sums_kernel", "gradient_kernel"]
    names = on(ONE, in_two=True, merges=True)
    in_three = step(x, dy)
    assert [name for name in names if name.startswith("merge")] == ["merge_kernel", "merge_sums_kernel"]
    for others in (in_two, in_three):
        for left, right in zip(at_once, others, strict=True):
            assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_gradients_of_parameters_alone_take_no_transform(on):
    names = on(ONE, in_two=True)
    x, dy = torch.randn(2, 6, 5).unbind()
    form = form_of(True, 1e-5, None, added=False)
    _, moments, _, _ = calls.train(x, None, None, None, form)
    dx, _, dweight, dbias = calls.backward(dy, x, moments, None, None, form, want_dx=False)
    x_hat = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    assert dx.numel() == 0
    assert_close((dweight, dbias), ((dy * x_hat).sum(0), dy.sum(0)), rtol=1e-4, atol=1e-5)
    assert names[2:] == ["gradient_sums_kernel", "merge_sums_kernel"]
