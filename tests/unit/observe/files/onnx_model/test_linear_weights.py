import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper
from tests.unit.observe.files.onnx_model.samples import graph, tensor

from bnlab.observe.files.onnx_model import linear_weights
from bnlab.observe.files.onnx_model.constants import Constants
from bnlab.observe.files.onnx_model.linear_weights import linear_of, read_weights
from bnlab.observe.files.onnx_model.scopes import Scope


def judged(nodes, initializer):
    made = graph(nodes, initializer)
    scope = Scope(made, Constants(made, Path()), 17)
    return read_weights([product for node in nodes if (product := linear_of(node, scope)) is not None])


def spoiled(shape, *positions, value=math.nan, dtype=np.float32):
    values = np.ones(shape, dtype=dtype)
    for position in positions:
        values[position] = value
    return values


def only(nodes, initializer):
    (state,) = judged(nodes, initializer)
    return state


def node(kind, inputs, **attributes):
    return helper.make_node(kind, ["x", *inputs], ["y"], "n", **attributes)


@pytest.mark.parametrize(
    ("made", "values", "channels", "bad"),
    [
        (node("Conv", ["w"]), spoiled((4, 3, 2, 2), (2, 1, 0, 0), (3, 0, 0, 1)), 4, (2, 3)),
        (node("ConvTranspose", ["w"]), spoiled((3, 4, 2, 2), (1, 2, 0, 0)), 4, (2,)),
        (node("ConvTranspose", ["w"], group=2), spoiled((4, 3, 2), (3, 1, 0)), 6, (4,)),
        (node("Gemm", ["w"]), spoiled((3, 5), (1, 4)), 5, (4,)),
        (node("Gemm", ["w"], transB=1), spoiled((5, 3), (4, 1)), 5, (4,)),
        (node("MatMul", ["w"]), spoiled((3, 5), (1, 4)), 5, (4,)),
    ],
)
def test_the_channels_of_every_operator(made, values, channels, bad):
    state = only([made], [tensor("w", values)])
    assert (state.channels, state.tensor, state.bad_channels) == (channels, "w", bad)
    assert math.isnan(state.value)
    assert only([made], [tensor("w", np.ones_like(values))]).value is None


def test_the_channel_of_a_transposed_convolution_is_the_one_that_onnxruntime_spoils():
    runtime = pytest.importorskip("onnxruntime")
    made = node("ConvTranspose", ["w"], group=2)
    weight = tensor("w", spoiled((4, 3, 2), (3, 1, 0)))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph([made], "g", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.ones((1, 4, 5), np.float32)})
    assert only([made], [weight]).bad_channels == tuple(np.flatnonzero(np.isnan(out).any(axis=(0, 2))).tolist())


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_every_floating_dtype(dtype):
    import ml_dtypes

    values = spoiled((4, 3, 1), (1, 0, 0), value=math.inf).astype(getattr(np, dtype, None) or ml_dtypes.bfloat16)
    assert only([node("Conv", ["w"])], [numpy_helper.from_array(values, "w")]).value == math.inf


@pytest.mark.parametrize(
    ("kind", "value", "is_bad"),
    [("Conv", -math.inf, True), ("Conv", math.nan, True), ("Gemm", -math.inf, False), ("Gemm", math.nan, True)],
)
def test_a_bias_of_minus_inf_may_rule_a_class_out(kind, value, is_bad):
    weight = np.ones((4, 3, 1)) if kind == "Conv" else np.ones((3, 4))
    state = only([node(kind, ["w", "b"])], [tensor("w", weight), tensor("b", spoiled(4, 2, value=value))])
    assert (state.value is not None) is is_bad
    assert state.bad_channels == ((2,) if is_bad else ())


@pytest.mark.parametrize(("value", "is_bad"), [(math.nan, True), (-math.inf, False)])
def test_what_is_added_to_a_matrix_product_is_its_bias(value, is_bad):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "n"), helper.make_node("Add", ["h", "b"], ["y"])]
    state = only(nodes, [tensor("w", np.ones((3, 4))), tensor("b", spoiled(4, 1, value=value))])
    assert (state.value is not None) is is_bad


def test_every_node_that_shares_a_weight_has_the_channels_of_its_own_axis():
    nodes = [node("MatMul", ["w"]), node("Gemm", ["w"], transB=1)]
    states = judged(nodes, [tensor("w", spoiled((4, 4), (1, 3)))])
    assert [state.bad_channels for state in states] == [(3,), (1,)]


def test_a_shared_bias_may_rule_a_class_out_in_the_matrix_product_alone():
    nodes = [node("Gemm", ["v", "b"]), node("Conv", ["w", "b"])]
    tensors = [
        tensor("v", np.ones((3, 4))),
        tensor("w", np.ones((4, 3, 1))),
        tensor("b", spoiled(4, 2, value=-math.inf)),
    ]
    assert [state.bad_channels for state in judged(nodes, tensors)] == [(), (2,)]
    assert [state.bad_channels for state in judged(nodes[::-1], tensors)] == [(2,), ()]


def test_weights_behind_other_nodes():
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("Constant", [], ["c"], value=tensor("c", spoiled((3, 2), (0, 0)))),
        helper.make_node("Transpose", ["c"], ["t"]),
        helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT),
        *(helper.make_node("MatMul", ["x", name], [f"y{name}"], name) for name in "dtw"),
    ]
    tensors = [
        tensor("q", np.ones((3, 2)), np.int8),
        tensor("s", spoiled((2,), 1)),
        tensor("half", spoiled((3, 2), (0, 1)), np.float16),
    ]
    states = judged(nodes, tensors)
    assert [(state.name, state.tensor, state.bad_channels) for state in states] == [
        *(("d", "s", ()), ("t", "c", ()), ("w", "half", (1,))),
    ]


def test_nodes_without_stored_weights_are_passed_over():
    mask = tensor("mask", spoiled((4, 4), (0, 1), value=-math.inf))
    nodes = [
        helper.make_node("MatMul", ["x", "k"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["c"], domain="mine"),
        helper.make_node("Mul", ["x", "mask"], ["m"]),
    ]
    assert judged(nodes, [mask, tensor("w", spoiled((4, 3), (0, 0)))]) == ()


def test_values_are_read_once_and_up_to_a_number_of_bytes(monkeypatch):
    monkeypatch.setattr(linear_weights, "_MAX_BYTES", 100)
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{n}"], f"n{n}") for n, name in enumerate("aaaab")]
    monkeypatch.setattr(linear_weights._Reader, "__init__", lambda self: self.__dict__.update(left=100, read={}))
    states = judged(nodes, [tensor("a", np.ones((3, 4))), tensor("b", np.ones((3, 4)))])
    assert [state.unread is None for state in states] == [True] * 4 + [False]


def test_values_that_cannot_be_read_leave_the_reason(tmp_path):
    outside = TensorProto(name="w", data_type=1, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="absent.bin")
    state = only([node("MatMul", ["w"])], [outside])
    assert state.unread == "the values of its 'w' cannot be read"
    assert state.value is None
