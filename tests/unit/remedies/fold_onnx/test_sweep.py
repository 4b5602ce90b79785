import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import info, kinds, made, names, normal, tensors  # noqa: E402

from bnlab.remedies.fold_onnx.sweep import Sweep  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def model_with(*nodes):
    constants = tensors({"a": normal(3), "b": normal(3), "unused": normal(3)})
    return made([*nodes, helper.make_node("Relu", ["x"], ["y"])], constants, (2, 3))


def test_constants_that_lost_their_last_use_go():
    model = model_with(
        helper.make_node("Cast", ["a"], ["wide"], to=onnx.TensorProto.DOUBLE),
        helper.make_node("Identity", ["b"], ["same"]),
        helper.make_node("Add", ["x", "same"], ["sum"]),
        helper.make_node("Cast", ["wide"], ["narrow"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "narrow"], ["product"]),
    )
    sweep = Sweep(model)
    sweep.remove_unused()
    assert kinds(model) == ["Cast", "Identity", "Add", "Cast", "Mul", "Relu"]  # nothing has changed
    del model.graph.node[4]
    sweep.remove_unused()
    assert kinds(model) == ["Identity", "Add", "Relu"]
    assert names(model.graph.initializer) == ["b", "unused"]  # unused from the beginning, so not ours to remove


def test_a_use_in_a_subgraph_keeps_a_constant_outside():
    inner = helper.make_graph([helper.make_node("Add", ["x", "a"], ["t"])], "then", [], [info("t", None)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [info("e", None)])
    model = model_with(
        helper.make_node("If", ["yes"], ["i"], then_branch=inner, else_branch=other),
        helper.make_node("Add", ["x", "a"], ["s"]),
        helper.make_node("Add", ["x", "b"], ["z"]),
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    sweep = Sweep(model)
    del model.graph.node[1:3]
    sweep.remove_unused()
    assert names(model.graph.initializer) == ["a", "unused", "yes"]


def test_a_sparse_constant_and_its_input_go():
    model = model_with(helper.make_node("Add", ["x", "sparse"], ["s"]))
    values, index = tensors({"sparse": [1.0]})[0], onnx.numpy_helper.from_array(np.array([1]), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, index, [3]))
    sweep = Sweep(model)
    del model.graph.node[0]
    sweep.remove_unused()
    assert not model.graph.sparse_initializer
