import numpy as np
import pytest
import torch

from bnlab.observe.float_formats import FLOAT_FORMATS

EIGHT_BITS = [name for name in FLOAT_FORMATS if name.startswith("float8")]


def by_torch(name):
    """Return the number of each code as torch converts it."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view(getattr(torch, name)).to(torch.float32).numpy()


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_all_codes_are_the_numbers_of_torch(name):
    numbers, expected = FLOAT_FORMATS[name].numbers, by_torch(name)
    assert np.array_equal(numbers, expected, equal_nan=True)
    assert np.array_equal(np.signbit(numbers[numbers == 0]), np.signbit(expected[expected == 0]))


def test_the_oracle_tells_the_formats_apart():
    tables = [by_torch(name).tobytes() for name in EIGHT_BITS]
    assert len(set(tables)) == len(EIGHT_BITS) == 5


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_precision_and_range_are_those_of_torch(name):
    form, info = FLOAT_FORMATS[name], torch.finfo(getattr(torch, name))
    assert form.smallest_normal == info.smallest_normal
    if info.bits == 8:
        numbers = by_torch(name)
        assert form.epsilon == numbers[numbers > 1].min() - 1  # torch.finfo is wrong for float8_e5m2fnuz
    else:
        assert form.epsilon == info.eps
    assert form.is_for_storage == (info.bits == 8)


def test_the_order_is_that_of_precision():
    bits = [form.mantissa_bits for form in FLOAT_FORMATS.values()]
    assert bits == sorted(bits, reverse=True)
