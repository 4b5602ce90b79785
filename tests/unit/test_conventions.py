import struct

import pytest

from bnlab.conventions import from_float32, momentum_from_decay


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("value", [1e-5, 1e-3, 2e-5, 0.9, 0.01, 0.1])
def test_a_float32_attribute_reads_back_as_the_decimal_it_stood_for(value):
    assert as_float32(value) != value
    assert from_float32(as_float32(value)) == value


@pytest.mark.parametrize(("decay", "momentum"), [(0.9, 0.1), (0.99, 0.01), (0.997, 0.003), (0.2, 0.8), (0.0, 1.0)])
def test_a_decay_is_the_weight_of_the_old_value(decay, momentum):
    assert momentum_from_decay(as_float32(decay)) == momentum
