import numpy as np
import pytest

pytest.importorskip("onnx")
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from bnlab.observe.files.onnx_model.constant_operators import OPERATORS, compute

DATA = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
BYTES = np.random.default_rng(0).integers(-128, 128, (4, 6)).astype(np.int8)
I64 = np.int64


def run(kind, operands, opset, **attributes):
    """Return the outputs of bnlab and of the reference implementation in the onnx package."""
    names = [f"i{index}" for index in range(len(operands))]
    node = helper.make_node(kind, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, operands, strict=True)
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    (expected,) = ReferenceEvaluator(model).run(None, dict(zip(names, operands, strict=True)))
    return compute(kind, operands, {attribute.name: attribute for attribute in node.attribute}), expected


@pytest.mark.parametrize(
    ("kind", "operands", "opset", "attributes"),
    [
        ("Cast", [DATA], 13, {"to": TensorProto.FLOAT16}),
        ("Cast", [DATA], 13, {"to": TensorProto.DOUBLE}),
        ("Cast", [DATA], 13, {"to": TensorProto.BFLOAT16}),
        ("CastLike", [DATA, np.zeros(1, np.float64)], 15, {}),
        ("Flatten", [DATA], 13, {}),
        ("Flatten", [DATA], 13, {"axis": -1}),
        ("Flatten", [DATA], 13, {"axis": 0}),
        ("Reshape", [DATA, np.array([0, -1], I64)], 14, {}),
        ("Reshape", [DATA, np.array([4, 6], I64)], 14, {}),
        ("Squeeze", [DATA[:1], np.array([0], I64)], 13, {}),
        ("Squeeze", [DATA[:1]], 13, {}),
        ("Squeeze", [DATA[:1]], 11, {"axes": [0]}),
        ("Transpose", [DATA], 13, {}),
        ("Transpose", [DATA], 13, {"perm": [1, 0, 2]}),
        ("Unsqueeze", [DATA, np.array([0, -1], I64)], 13, {}),
        ("Unsqueeze", [DATA], 11, {"axes": [1]}),
        ("DequantizeLinear", [BYTES, np.array(0.1, np.float32), np.array(3, np.int8)], 19, {}),
        ("DequantizeLinear", [BYTES, np.array(0.1, np.float32)], 19, {}),
        ("DequantizeLinear", [BYTES, DATA[0, 0] + 1, np.arange(4, dtype=np.int8)], 19, {"axis": 0}),
        ("DequantizeLinear", [BYTES, DATA[0, :2].reshape(-1)[:6] + 1, np.zeros(6, np.int8)], 19, {"axis": -1}),
        ("DequantizeLinear", [BYTES, DATA[0, :2, :].reshape(4, 2) + 1], 21, {"axis": 1, "block_size": 3}),
    ],
)
def test_the_operators_are_those_of_the_reference(kind, operands, opset, attributes):
    got, expected = run(kind, operands, opset, **attributes)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize(
    ("kind", "operands"),
    [
        ("Reshape", [DATA, np.array([5, 5], I64)]),
        ("Reshape", [DATA, np.array([0, 0, 0, 0], I64)]),
        ("Reshape", [DATA]),
        ("Squeeze", [DATA, np.array([7], I64)]),
        ("Squeeze", [DATA, np.array([0], I64)]),
        ("Unsqueeze", [DATA, np.array([0] * 3, I64)]),
        ("Unsqueeze", [DATA]),
        ("Cast", [DATA]),
        ("CastLike", [DATA]),
        ("DequantizeLinear", [BYTES]),
        ("DequantizeLinear", [BYTES, np.ones(5, np.float32)]),
        ("DequantizeLinear", [BYTES, np.ones((2, 2), np.float32)]),
        ("Transpose", [None]),
        ("Transpose", []),
    ],
)
def test_operands_that_do_not_fit_give_nothing(kind, operands):
    assert compute(kind, operands, {}) is None


def test_a_type_that_holds_no_numbers_gives_nothing():
    attribute = helper.make_attribute("to", TensorProto.STRING)
    assert compute("Cast", [DATA], {"to": attribute}) is None


def test_nothing_grows():
    assert set(OPERATORS).isdisjoint({"Expand", "Tile", "Concat", "Pad", "Resize", "ConstantOfShape"})
