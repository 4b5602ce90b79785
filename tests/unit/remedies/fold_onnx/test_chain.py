import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    bn_node,
    folded,
    kinds,
    normal,
    parameters,
    prefixed,
    same,
    saved,
    tensors,
)

from bnlab.remedies.fold_onnx.run import run_model  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def test_new_names_are_free(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["bn.folded"]),
        helper.make_node("MatMul", ["fc.weight", "bn.folded"], ["bn.folded_bias"]),
        helper.make_node("Cast", ["bn.folded_bias"], ["bn.folded_weight"], to=onnx.TensorProto.FLOAT),
        bn_node("bn.folded_weight"),
    ]
    path = saved(tmp_path, nodes, tensors({"fc.weight": normal(4, 3), **prefixed(parameters(4))}), (2, 3, 5))
    x = normal(2, 3, 5)
    expected = run_model(onnx.load(path), {"x": x.astype("float32")})["y"]
    model, _ = folded(path)
    assert kinds(model) == ["Relu", "MatMul", "Add", "Cast"]
    results = [name for node in model.graph.node for name in node.output]
    assert len({*results}) == len(results)
    same(model, x, expected)


def test_a_node_between_that_stays_keeps_its_attributes(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "product"),
        helper.make_node("Transpose", ["h"], ["t"], "turn", perm=[0, 2, 1]),
        bn_node("t"),
    ]
    path = saved(tmp_path, nodes, tensors({"fc.weight": normal(3, 4), **prefixed(parameters(4))}), (2, 5, 3))
    model, _ = folded(path)
    turn = next(node for node in model.graph.node if node.op_type == "Transpose")
    assert (turn.name, list(turn.attribute[0].ints), list(turn.output)) == ("turn", [0, 2, 1], ["y"])
