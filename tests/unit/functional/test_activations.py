"""The table of activations: function, module and kernel of a row agree."""

from typing import get_args

import pytest
import torch

from bnlab.errors import UsageError
from bnlab.functional.activations import ACTIVATIONS, Activation, activation_function

rows = pytest.mark.parametrize("name", ACTIVATIONS)


def test_every_name_of_the_type_has_a_row():
    assert set(get_args(Activation)) == set(ACTIVATIONS)


@rows
def test_function_and_module_are_the_same(name, device):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64).to(device)
    form = ACTIVATIONS[name]
    assert torch.equal(form.function(x), form.module()(x))
    assert activation_function(name) is form.function


@rows
def test_what_the_kernels_apply_is_linear_on_either_side_of_0(name, device):
    form = ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64).to(device)
    is_linear = bool(torch.allclose(form.function(x), torch.where(x > 0, x, form.slope * x)))
    assert is_linear == (form.kernel is not None)


def test_another_name_is_refused():
    assert activation_function(None) is None
    with pytest.raises(UsageError, match=r"activation: name must be one of relu, .* or None, got 'swish'"):
        activation_function("swish")
