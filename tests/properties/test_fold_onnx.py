"""Random small ONNX graphs: the folded model gives the outputs of the original in onnxruntime, with no more nodes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

CHANNELS = 4
KEYS = ("weight", "bias", "running_mean", "running_var")
LINEAR = ("Conv", "depthwise", "dilated", "ConvTranspose", "MatMul", "left MatMul", "Gemm")
LINKS = (
    *("Add", "Add first", "Sub", "Sub from", "Mul", "Div", "scalar Add", "Add over positions"),
    *("Identity", "Dropout", "Cast", "Transpose", "Relu", "BN", "shared"),
)


class Graph:
    """Builds a graph step by step. Every step maps (2, CHANNELS, ...) to the same rank and channels."""

    def __init__(self, seed: int, rank: int, opset: int) -> None:
        self.random = np.random.default_rng(seed)
        self.rank, self.opset = rank, opset
        self.nodes, self.constants = [], []
        self.source, self.number, self.is_turned = "x", 0, False

    def constant(self, values, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, *shape):
        return self.constant(self.random.standard_normal(shape))

    def add(self, kind, inputs, **attributes):
        self.number += 1
        result = f"t{self.number}"
        self.nodes.append(helper.make_node(kind, inputs, [result], **attributes))
        self.source = result

    def batch_norm(self):
        values = [self.random.uniform(0.5, 2, CHANNELS), *self.random.standard_normal((2, CHANNELS))]
        names = [self.constant(value) for value in (*values, self.random.uniform(0.1, 2, CHANNELS))]
        self.add("BatchNormalization", [self.source, *names], epsilon=0.1)

    def linear(self, kind, *, has_bias):
        spatial = self.rank - 2
        if not spatial or kind == "Gemm":
            self.matrix("Gemm" if kind == "Gemm" and not spatial else "MatMul", has_bias=has_bias)
        elif kind == "MatMul":  # over the last axis
            self.add("MatMul", [self.source, self.normal(5, 5)])
        elif kind == "left MatMul":
            self.add("MatMul", [self.normal(CHANNELS, CHANNELS) if self.rank == 3 else self.normal(5, 5), self.source])
        else:
            self.convolution(kind, spatial, has_bias=has_bias)

    def convolution(self, kind, spatial, *, has_bias):
        group = {"depthwise": CHANNELS, "dilated": 2}.get(kind, 1)
        weight = self.normal(CHANNELS, CHANNELS // group, *[3] * spatial)
        gap = 2 if kind == "dilated" else 1
        names = [self.source, weight, *([self.normal(CHANNELS)] if has_bias else [])]
        operator = "ConvTranspose" if kind == "ConvTranspose" else "Conv"
        self.add(operator, names, group=group, dilations=[gap] * spatial, pads=[gap] * (2 * spatial))

    def matrix(self, kind, *, has_bias):
        if kind == "MatMul":
            side = CHANNELS if self.rank == 2 else 5
            self.add("MatMul", [self.source, self.normal(side, side)])
            return
        has_bias |= self.opset < 11  # not optional before
        bias = [self.normal(*self.random.choice([1, CHANNELS], 1))] if has_bias else []
        attributes = {"transB": int(self.random.integers(2)), "alpha": 0.5, "beta": -2.0}
        self.add("Gemm", [self.source, self.normal(CHANNELS, CHANNELS), *bias], **attributes)

    def link(self, kind):
        per_channel = (CHANNELS, *[1] * (self.rank - 2))
        if kind in ("Add", "Mul", "Div", "Sub"):
            shape = (1, *per_channel) if self.random.integers(2) else per_channel
            values = self.random.uniform(0.5, 2, shape) * self.random.choice([-1, 1])
            self.add(kind, [self.source, self.constant(values)])
        elif kind in ("Add first", "Sub from"):
            self.add(kind.split()[0], [self.normal(*per_channel), self.source])
        elif kind == "scalar Add":
            self.add("Add", [self.source, self.constant(0.5)])
        elif kind == "Add over positions":
            self.add("Add", [self.source, self.normal(5 if self.rank > 2 else CHANNELS)])
        elif kind == "Cast":
            self.add("Cast", [self.source], to=TensorProto.FLOAT)
        elif kind == "Transpose":
            self.add("Transpose", [self.source], perm=[*range(self.rank)])
        elif kind == "BN":
            self.batch_norm()
        elif kind == "shared":  # another use, so nothing can be folded across it
            before = self.source
            self.add("Relu", [before])
            self.add("Add", [self.source, before])
        else:
            self.add(kind, [self.source])

    def model(self):
        shape = (2, CHANNELS, *[5] * (self.rank - 2))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        ir = 3 if self.opset < 9 else 8
        if ir == 3:
            inputs += [helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in self.constants]
        output = helper.make_tensor_value_info(self.source, TensorProto.FLOAT, [None] * self.rank)
        graph = helper.make_graph(self.nodes, "g", inputs, [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir)


@st.composite
def graphs(draw):
    graph = Graph(
        draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([7, 11, 13, 17, 21]))
    )
    for _ in range(draw(st.integers(1, 3))):
        parts = [("link", kind) for kind in draw(st.lists(st.sampled_from(LINKS), max_size=2))]
        parts.append(("linear", draw(st.sampled_from(LINEAR))))
        parts += [("link", kind) for kind in draw(st.lists(st.sampled_from(LINKS), max_size=2))]
        for what, kind in parts:
            graph.link(kind) if what == "link" else graph.linear(kind, has_bias=draw(st.booleans()))
        if draw(st.booleans()) or not any(node.op_type == "BatchNormalization" for node in graph.nodes):
            graph.batch_norm()
    return graph.model()


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.booleans())
def test_the_folded_model_computes_the_same(model, with_own_evaluator):
    x = np.random.default_rng(3).standard_normal([d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim])
    x = x.astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if with_own_evaluator:
            patch.setitem(__import__("sys").modules, "onnxruntime", None)
        path = Path(folder) / "m.onnx"
        onnx.save(model, path)
        result = fold_onnx(path)
    folded = onnx.load_from_string(result.content)
    onnx.checker.check_model(folded, full_check=True)
    expected, actual = run(model, x), run(folded, x)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    assert len(folded.graph.node) <= len(model.graph.node)
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds.count("BatchNormalization") == len(result.changes.left_alone)
    assert len(kinds) <= len(model.graph.node) - sum("Add" not in c.after for c in result.changes.changes)
