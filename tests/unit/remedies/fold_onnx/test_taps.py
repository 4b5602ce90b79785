import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import made, normal, tensors  # noqa: E402

from bnlab.remedies.fold_onnx.taps import convolve, convolve_transposed  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")

CONVOLUTIONS = [
    # operator, input, weight, attributes
    ("Conv", (2, 6, 9), (4, 6, 3), {"dilations": [2], "strides": [2], "pads": [3, 1]}),
    ("Conv", (2, 6, 9, 8), (4, 3, 3, 2), {"group": 2, "strides": [2, 3], "auto_pad": "SAME_UPPER"}),
    ("Conv", (2, 6, 9, 8), (4, 3, 3, 2), {"group": 2, "strides": [2, 3], "auto_pad": "SAME_LOWER"}),
    ("Conv", (2, 6, 9, 8), (4, 3, 3, 2), {"group": 2, "auto_pad": "VALID"}),
    ("Conv", (2, 6, 9, 8, 7), (12, 1, 3, 2, 2), {"group": 6, "dilations": [2, 3, 1], "pads": [1, 0, 0, 1, 2, 1]}),
    ("ConvTranspose", (2, 6, 5), (6, 2, 3), {"group": 3, "strides": [2], "pads": [1, 0], "output_padding": [1]}),
    ("ConvTranspose", (2, 6, 5), (6, 2, 3), {"dilations": [2]}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 2, 3, 2), {"group": 2, "strides": [2, 3], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 2, 3, 3), {"strides": [2, 2], "auto_pad": "VALID"}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 2, 3, 3), {"strides": [2, 2], "output_shape": [10, 9]}),
    ("ConvTranspose", (2, 6, 5, 4), (6, 1, 3, 3), {"group": 6}),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("kind", "shape", "weight_shape", "attributes"), CONVOLUTIONS)
def test_convolutions_are_those_of_onnxruntime(kind, shape, weight_shape, attributes, has_bias):
    x, weight = normal(*shape).astype(np.float32), normal(*weight_shape).astype(np.float32)
    channels = weight_shape[0] if kind == "Conv" else weight_shape[1] * attributes.get("group", 1)
    bias = normal(channels).astype(np.float32) if has_bias else None
    values = {"w": weight, **({} if bias is None else {"b": bias})}
    model = made([helper.make_node(kind, ["x", *values], ["y"], **attributes)], tensors(values), shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    actual = (convolve if kind == "Conv" else convolve_transposed)(x, weight, bias, **attributes)
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < 1e-4
    if has_bias:  # the comparison tells a bias that is forgotten
        without = (convolve if kind == "Conv" else convolve_transposed)(x, weight, None, **attributes)
        assert np.abs(without - expected).max() > 1e-2


def test_padding_and_dilation_together():
    x, weight = normal(1, 2, 9), normal(3, 2, 3)
    padded = np.pad(x, [(0, 0), (0, 0), (3, 3)])
    expected = convolve(padded, weight, dilations=[3])
    assert np.array_equal(convolve(x, weight, dilations=[3], auto_pad="SAME_UPPER"), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_narrow_dtypes_are_summed_in_float32(dtype):

    stored = np.dtype(
        helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value({"float64": "DOUBLE"}.get(dtype, dtype.upper())))
    )
    x, weight = np.ones((1, 4096, 1)).astype(stored), np.ones((1, 4096, 1)).astype(stored)
    result = convolve(x, weight)
    assert result.dtype == stored
    assert float(result[0, 0, 0]) == 4096  # a sum in float16 or bfloat16 ends at 2048 or 256


def test_memory_does_not_grow_with_the_dilation():
    import tracemalloc

    x, weight = np.zeros((1, 8, 20_000), dtype=np.float32), np.zeros((8, 8, 3), dtype=np.float32)
    peaks = []
    for dilation in (1, 4096):
        tracemalloc.start()
        convolve(x, weight, dilations=[dilation])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[0] < 8 * x.nbytes


@pytest.mark.parametrize(("shape", "attributes"), [((1, 3, 9), {}), ((1, 2, 2), {}), ((1, 2, 9), {"strides": [1, 1]})])
def test_what_does_not_fit(shape, attributes):
    with pytest.raises(ValueError, match="must"):
        convolve(np.zeros(shape), np.zeros((4, 2, 3)), **attributes)
