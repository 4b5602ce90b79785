"""The results of an operator have the strides that its fake kernel promises."""

import pytest
import torch
from tests import oracle

from bnlab.kernels.compiled.strides import with_strides_of


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_values_keep_and_strides_are_those_of_empty_like(layout):
    x, values = oracle.LAYOUTS[layout](torch.zeros(2, 3, 4, 5)), torch.randn(2, 3, 4, 5)
    result = with_strides_of(x, values)
    assert result.stride() == torch.empty_like(x).stride()
    assert torch.equal(result, values)


def test_what_fits_is_passed_on_and_a_view_is_copied():
    x = torch.zeros(2, 3)
    values = torch.ones(2, 3)
    assert with_strides_of(x, values) is values
    assert with_strides_of(x, torch.ones(4, 3)[:2])._base is None
