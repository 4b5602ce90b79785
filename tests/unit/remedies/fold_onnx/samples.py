"""What the tests of this package share."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402
from bnlab.remedies.fold_onnx.run import difference, run_model  # noqa: E402

KEYS = ("weight", "bias", "running_mean", "running_var")
EPS = 0.1  # large, so that forgetting it shows
RANDOM = np.random.default_rng(7)


def normal(*shape):
    return RANDOM.standard_normal(shape)


def parameters(channels):
    return {
        "weight": normal(channels),
        "bias": normal(channels),
        "running_mean": normal(channels),
        "running_var": RANDOM.uniform(0.05, 2, channels),
    }


def tensors(values, dtype=np.float32):
    return [numpy_helper.from_array(np.asarray(value).astype(dtype), name) for name, value in values.items()]


def prefixed(values, prefix="bn."):
    return {prefix + key: value for key, value in values.items()}


def bn_node(source="h", result="y", prefix="bn.", **attributes):
    inputs = [source, *(prefix + key for key in KEYS)]
    return helper.make_node("BatchNormalization", inputs, [result], **{"epsilon": EPS, **attributes})


def info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def made(
    nodes, initializer, shape, *, outputs=("y",), opset=17, ir=10, inputs=(), functions=(), kind=TensorProto.FLOAT
):
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", shape, kind), *inputs],
        [output if not isinstance(output, str) else info(output, None, kind) for output in outputs],
        initializer=initializer,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=ir)
    for output, typed in zip(model.graph.output, onnx.shape_inference.infer_shapes(model).graph.output, strict=True):
        output.CopyFrom(typed)
    return model


def saved(tmp_path, *arguments, **keywords):
    path = tmp_path / "m.onnx"
    onnx.save(made(*arguments, **keywords), path)
    return path


def folded(path, **keywords):
    before = path.read_bytes()
    result = fold_onnx(path, **keywords)
    assert path.read_bytes() == before
    model = onnx.load_from_string(result.content)
    if all(output.type.tensor_type.HasField("shape") for output in model.graph.output):
        onnx.checker.check_model(model, full_check=True)
    return model, result.changes


def kinds(model):
    return [node.op_type for node in model.graph.node]


def names(field):
    return [value.name for value in field]


def batch_norm(x, values, eps=EPS):
    """The oracle: the formula, value by value in float64, with the rounded parameters of the file."""
    weight, bias, mean, var = (
        np.asarray(values[key]).astype(np.float32).astype(np.float64).reshape(-1, *([1] * (x.ndim - 2))) for key in KEYS
    )
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def wide(array):
    """A float32 array as a float64 tensor, for torch's own convolutions."""
    return None if array is None else torch.from_numpy(np.asarray(array).astype(np.float32).astype(np.float64))


def same(model, x, expected, output="y", tolerance=1e-5):
    actual = run_model(model, {"x": x.astype(np.float32)})[output]
    error = difference(np.asarray(expected), actual)
    assert error < tolerance, error


def conv_relu_bn(values, weight):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        bn_node("r"),
    ]
    return nodes, tensors({"c.weight": weight, **prefixed(values)})
