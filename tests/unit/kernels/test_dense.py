"""Tensors in the layouts that the kernels read."""

import pytest
import torch
from tests import oracle

from bnlab.kernels.dense import dense, position_weights, same_layout

SHAPES = [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_input_stays_the_same_tensor(shape):
    x = torch.randn(shape)
    assert dense(x) is x


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_channels_last_input_stays_the_same_tensor(shape):
    x = oracle.LAYOUTS["channels_last"](torch.randn(shape))
    assert not x.is_contiguous()
    assert dense(x) is x


@pytest.mark.parametrize("shape", SHAPES)
def test_other_layouts_become_contiguous(shape):
    x = oracle.LAYOUTS["strided"](torch.randn(shape))
    assert dense(x).is_contiguous()
    assert torch.equal(dense(x), x)


def test_channels_last_of_three_dimensions_becomes_contiguous():
    x = oracle.LAYOUTS["channels_last"](torch.randn(2, 3, 5))
    assert dense(x).is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("other", [*oracle.LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_get_the_layout_and_dtype_of_the_input(layout, other, dtype):
    x = oracle.LAYOUTS[layout](torch.randn(2, 3, 4, 5)).to(dtype)
    values = oracle.LAYOUTS[other](torch.randn(2, 3, 4, 5))
    result = same_layout(values, x)
    assert (result.dtype, result.stride()) == (x.dtype, x.stride())
    assert torch.equal(result, values.to(dtype))
    assert (result is values) == (dtype == values.dtype and other == layout)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 1, 4, 5), (1, 1, 4, 5), (2, 1, 1, 5)])
def test_a_mask_becomes_a_weight_for_every_position(shape):
    mask, x = torch.rand(shape) > 0.5, torch.empty(2, 3, 4, 5)
    weights = position_weights(mask, x)
    assert (weights.dtype, weights.shape, weights.is_contiguous()) == (torch.float32, (2, 20), True)
    assert all(
        weights[n, 5 * row + column] == mask.expand(2, 1, 4, 5)[n, 0, row, column]
        for n in range(2)
        for row in range(4)
        for column in range(5)
    )
