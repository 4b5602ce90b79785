"""Small ONNX models, written with the helpers of the onnx package."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KEYS = ("weight", "bias", "running_mean", "running_var")
RANDOM = np.random.default_rng(0)
VALUES = dict(zip(KEYS, RANDOM.uniform(0.5, 2, (4, 3)).astype(np.float32), strict=True))


def tensor(name, values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def parameters(prefix="bn.", values=VALUES, *, without=()):
    return [tensor(prefix + key, value) for key, value in values.items() if key not in without]


def batch_norm(prefix="bn.", source="x", outputs=("y",), **attributes):
    names = [source, *(prefix + key for key in KEYS)]
    return helper.make_node("BatchNormalization", names, list(outputs), "n", **attributes)


def graph(nodes, initializer=(), sparse=(), *, shape=(2, 3, 4, 4)):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_graph(nodes, "g", inputs, outputs, initializer=initializer, sparse_initializer=sparse)


def model(nodes, initializer=(), *, opset=17, functions=(), sparse=(), shape=(2, 3, 4, 4)):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    made = helper.make_model(graph(nodes, initializer, sparse, shape=shape), opset_imports=opsets, functions=functions)
    made.ir_version = 8
    return made


def write(path, *args, **kwargs):
    onnx.save(model(*args, **kwargs), path)
    return path


def function(name, inputs, nodes, attributes=()):
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_function("mine", name, list(inputs), ["y"], nodes, opsets, list(attributes))
