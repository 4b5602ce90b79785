from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from bnlab.observe.files.onnx_model.external_data import ModelFile  # noqa: E402
from bnlab.observe.files.onnx_model.tensor_values import (  # noqa: E402
    dtype_name,
    holds_numbers,
    number_of_values,
    tensor_values,
    value_parts,
)

HERE = ModelFile(Path())
KINDS = [kind for kind in TensorProto.DataType.values() if holds_numbers(kind)]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=[TensorProto.DataType.Name(kind) for kind in KINDS])
def test_every_data_type_is_read_as_onnx_reads_it(kind, raw):
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(helper.tensor_dtype_to_np_dtype(kind))
    stored = numpy_helper.from_array(values, "w")
    if not raw:
        try:
            stored = helper.make_tensor("w", kind, values.shape, values.reshape(-1))
        except (ValueError, TypeError, KeyError):
            pytest.skip("onnx writes this type as raw data only")
    read = tensor_values(stored, HERE)
    assert read.dtype == values.dtype
    expected = numpy_helper.to_array(stored).astype(np.complex128)
    np.testing.assert_array_equal(read.astype(np.complex128), expected)


@pytest.mark.parametrize("kind", [0, TensorProto.STRING, 999])
def test_what_holds_no_numbers_is_refused(kind):
    assert not holds_numbers(kind)
    with pytest.raises(ValueError, match="holds no numbers"):
        tensor_values(TensorProto(name="w", data_type=kind, dims=[1]), HERE)


@pytest.mark.parametrize(
    "fields", [{"raw_data": b"1234"}, {"float_data": [1.0]}, {}, {"raw_data": bytes(12)}, {"int32_data": [1, 2]}]
)
def test_other_lengths_than_the_dims_promise_are_refused(fields):
    with pytest.raises(ValueError, match="must hold the values its dims promise"):
        tensor_values(TensorProto(name="w", data_type=1, dims=[2], **fields), HERE)


def test_shapes_that_no_array_has():
    assert number_of_values([1] * 600_000) > 1 << 60
    assert number_of_values([]) == 1
    with pytest.raises(ValueError, match="impossible shape"):
        number_of_values([2, -1])


def test_names_of_data_types():
    assert [dtype_name(kind) for kind in (1, 10, 11, 16, 7)] == [
        *("float32", "float16", "float64", "bfloat16", "onnx type 7"),
    ]


@pytest.mark.parametrize("is_external", [True, False])
def test_values_in_parts(tmp_path, is_external):
    values = np.arange(10, dtype=np.float32).reshape(2, 5)
    stored = numpy_helper.from_array(values, "w")
    if is_external:
        (tmp_path / "w.bin").write_bytes(b"123" + stored.raw_data)
        onnx.external_data_helper.set_external_data(stored, "w.bin", 3, 40)
        stored.ClearField("raw_data")
    parts = list(value_parts(stored, ModelFile(tmp_path), 4))
    assert [start for start, _ in parts] == [0, 4, 8]
    assert np.concatenate([part for _, part in parts]).tolist() == values.reshape(-1).tolist()
