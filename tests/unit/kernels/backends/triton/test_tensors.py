"""What the launches pass on, and in which order."""

from __future__ import annotations

import inspect

import pytest
import torch

from bnlab.kernels.backends.triton.tensors import (
    ForwardTensors,
    Gradients,
    IncomingTensors,
    float64_scratch,
    kinds_of,
    numbers_of,
)
from bnlab.kernels.form import Form


def test_kinds_are_dtypes_of_tensors_that_are_there():
    assert kinds_of(torch.ones(1), None, torch.ones(1, dtype=torch.float16)) == (torch.float32, None, torch.float16)


def test_eps_keeps_the_digits_of_float64():
    high, low, slope = numbers_of(Form(True, 1e-5, 2, 0.01))
    assert (high + low, slope) == (1e-5, 0.01)
    assert high != 1e-5


def test_scratch_lies_on_the_device_of_the_tensor():
    scratch = float64_scratch(torch.empty(3, device="meta"), 7)
    assert (scratch.shape, scratch.dtype, scratch.device.type) == ((7,), torch.float64, "meta")


def test_the_kernels_take_the_tensors_in_the_order_of_their_fields():
    pytest.importorskip("triton")
    from bnlab.kernels.backends.triton.device import gradient

    names = list(inspect.signature(gradient.gradient_kernel.fn).parameters)
    assert tuple(names[:7]) == IncomingTensors._fields
    assert tuple(names[8:12]) == Gradients._fields
    assert tuple(inspect.signature(gradient.gradient_sums_kernel.fn).parameters)[:7] == IncomingTensors._fields
    assert ForwardTensors._fields == ("x", "residual", "y", "bits", "weight", "bias", "moments")
