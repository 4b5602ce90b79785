import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnlab.observe.files.content import Span
from bnlab.observe.files.tensors import FLOATING, INTEGER, as_numbers, fortran_strides, is_shape, item_bytes, strided


def raw(tensor):
    return Span.of(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("name", sorted(FLOATING | INTEGER))
def test_every_dtype_reads_as_torch_does(name):
    tensor = (torch.randn(12) * 50).to(getattr(torch, name)).reshape(3, 4)
    values = as_numbers(strided(raw(tensor), name, (3, 4)), name)
    assert np.array_equal(values.astype(np.float64), tensor.double().numpy())


def test_the_oracle_catches_a_wrong_value():
    tensor = torch.randn(4)
    values = strided(raw(tensor), "float32", (4,))
    values[2] = np.nextafter(values[2], np.float32(9))
    assert not np.array_equal(values, tensor.numpy())


@given(st.permutations([0, 1, 2]), st.integers(0, 3))
def test_any_view_reads_as_torch_does(order, first):
    base = torch.arange(120.0).reshape(4, 5, 6)
    view = base.permute(order)[first:]
    values = strided(raw(base), "float32", view.shape, strides=view.stride(), offset=view.storage_offset())
    assert np.array_equal(values, view.numpy())


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 1, 3)])
def test_fortran_strides_are_those_of_numpy(shape):
    array = np.zeros(shape, np.uint8, order="F")
    assert fortran_strides(shape) == array.strides


@pytest.mark.parametrize("lengths", [(), (0, (1 << 63) - 1), [3] * 64])
@pytest.mark.parametrize("wrong", [-1, 1 << 63, True, 2.0, "3", None])
def test_what_is_a_shape(lengths, wrong):
    assert is_shape(lengths)
    assert not is_shape([*lengths[1:], wrong])
    assert not is_shape([1] * 65)


def test_big_endian_storages_are_swapped():
    values = np.array([1.5, -2.0, 3e5], dtype=np.float32)
    assert np.array_equal(strided(Span.of(values.astype(">f4").tobytes()), "float32", (3,), big_endian=True), values)


def test_the_values_can_be_written_to():
    values = strided(Span.of(bytes(8)), "float32", (2,))
    values[:] = 1
    assert (values == 1).all()


def test_empty_and_scalar_tensors():
    assert strided(Span.of(b""), "float32", (0, 3)).shape == (0, 3)
    assert strided(Span.of(bytes(8)), "int64", ()).item() == 0


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((3,), None, 0), ((2,), (2,), 0), ((1,), (1,), 2), ((2,), (-1,), 1), ((1,), (1,), -1), ((2,), (1, 1), 0)],
)
def test_a_tensor_outside_its_storage_is_refused(shape, strides, offset):
    with pytest.raises(ValueError, match=r"needs .* bytes|impossible"):
        strided(Span.of(bytes(8)), "float32", shape, strides=strides, offset=offset)


def test_an_unknown_dtype_is_named_but_not_read():
    assert item_bytes("float4_e2m1fn_x2") is None
    with pytest.raises(ValueError, match="float4_e2m1fn_x2 cannot be read"):
        strided(Span.of(bytes(8)), "float4_e2m1fn_x2", (2,))


def test_the_codes_of_a_float8_become_numbers():
    bits = strided(Span.of(b"\x01\x80"), "float8_e4m3fn", (2,))
    assert bits.tolist() == [1, 128]
    assert as_numbers(bits, "float8_e4m3fn").tolist() == [2**-9, 0]


def test_the_bits_of_bfloat16_are_kept_also_of_a_nan():
    bits = np.array([0x7F81, 0x3F80], dtype=np.uint16)
    assert strided(Span.of(bits.tobytes()), "bfloat16", (2,)).tolist() == bits.tolist()
    assert as_numbers(bits, "bfloat16")[1] == 1.0


def test_more_dimensions_than_torch_has_are_refused():
    assert strided(Span.of(bytes(4)), "float32", (1,) * 64).shape == (1,) * 64
    with pytest.raises(ValueError, match="65 dimensions, torch has at most 64"):
        strided(Span.of(bytes(4)), "float32", (1,) * 65)
