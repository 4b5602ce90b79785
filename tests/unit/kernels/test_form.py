"""How a layer computes its output, in the terms of the kernels."""

import pytest

from bnlab.functional.activations import ACTIVATIONS
from bnlab.kernels.form import Form, form_of, kernel_of

WITH_KERNEL = [name for name, activation in ACTIVATIONS.items() if activation.kernel is not None]


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_an_activation_has_a_number_of_its_own(name):
    number, slope = kernel_of(name)
    assert number > 0
    assert (number, slope) == (ACTIVATIONS[name].kernel, ACTIVATIONS[name].slope)
    assert [kernel_of(other)[0] for other in (None, *WITH_KERNEL)].count(number) == 1


def test_no_activation_is_number_0():
    assert kernel_of(None) == (0, 0.0)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in WITH_KERNEL])
def test_an_activation_without_kernel_has_no_form(name):
    with pytest.raises(KeyError):
        form_of(True, 1e-5, name, added=False)


@pytest.mark.parametrize(
    ("activation", "added", "expected"),
    [(None, False, False), (None, True, False), ("relu", False, False), ("relu", True, True)],
)
def test_bits_are_needed_where_the_input_does_not_tell_what_passed(activation, added, expected):
    assert form_of(True, 1e-5, activation, added).has_bits is expected


def test_a_form_carries_what_it_is_made_of():
    assert form_of(False, 1e-3, "leaky_relu", added=True) == Form(False, 1e-3, *kernel_of("leaky_relu"), True)
    assert kernel_of("leaky_relu")[1] == 0.01
