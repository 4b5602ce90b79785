import math
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import bn_node, made, normal, parameters, prefixed, saved, tensors  # noqa: E402

from bnlab.errors import DamagedFile  # noqa: E402
from bnlab.remedies.fold_onnx.cost import typed  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402
from bnlab.remedies.fold_onnx.links import link_of, shape_before  # noqa: E402
from bnlab.remedies.fold_onnx.scope import all_scopes  # noqa: E402
from bnlab.remedies.refusal import Refusal  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def link(kind, inputs, constants=(), opset=17, outputs=("y",), **attributes):
    node = helper.make_node(kind, inputs, list(outputs), **attributes)
    model = made([node], list(constants), (2, 4, 3), opset=opset)
    (scope,) = all_scopes(model, typed(model), Path("m.onnx"))
    return link_of(scope.nodes[0], scope)


def test_where_axes_come_from():
    axes = [numpy_helper.from_array(np.array([-1, 1]), "axes")]
    assert link("Transpose", ["x"], perm=[2, 0, 1]).positions(3) == [2, 0, 1]
    assert link("Transpose", ["x"]).positions(3) == [2, 1, 0]
    assert link("Unsqueeze", ["x", "axes"], axes).positions(2) == [0, None, 1, None]
    assert link("Squeeze", ["x", "axes"], axes).positions(4) == [0, 2]
    assert link("Cast", ["x"], to=TensorProto.FLOAT16).positions(3) == [0, 1, 2]
    assert shape_before([0, None, 1, None], 2, (5, 1, 6, 1)) == (5, 6)
    assert shape_before([2, 0, 1], 3, (7, 8, 9)) == (8, 9, 7)
    with pytest.raises(Refusal, match="Transpose turns 3 axes of a tensor with 4"):
        link("Transpose", ["x"], perm=[2, 0, 1]).positions(4)
    with pytest.raises(Refusal, match="the axes of Squeeze are not known"):
        link("Squeeze", ["x"]).positions(3)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 4, 1)])
def test_a_value_per_channel_in_any_shape(shape):
    values = normal(*shape).astype(np.float32)
    constant = tensors({"c": values})
    factor, offset = link("Add", ["c", "x"], constant).affine(3, 1, 4)
    assert np.array_equal(factor, np.ones(4))
    assert np.allclose(offset, np.broadcast_to(values.reshape(-1), 4))
    factor, offset = link("Sub", ["c", "x"], constant).affine(3, 1, 4)
    assert np.array_equal(factor, -np.ones(4))
    factor, offset = link("Div", ["x", "c"], constant).affine(3, 1, 4)
    assert np.allclose(factor, 1 / np.broadcast_to(values.reshape(-1), 4).astype(float))


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 1, 1), (1, 1, 4, 1)])
def test_values_per_position_are_refused(shape):
    with pytest.raises(Refusal, match="which is not one value per channel"):
        link("Mul", ["x", "c"], tensors({"c": normal(*shape)})).affine(3, 1, 4)


def test_the_old_way_to_broadcast():
    constant = tensors({"c": normal(4)})
    old = link("Add", ["x", "c"], constant, opset=6, broadcast=1, axis=1)
    assert np.allclose(old.affine(3, 1, 4)[1], numpy_helper.to_array(constant[0]))
    with pytest.raises(Refusal, match="not one value per channel"):
        link("Add", ["x", "c"], constant, opset=6, broadcast=1).affine(3, 1, 4)


def test_what_is_no_link():
    constant = tensors({"c": normal(4, 1), "d": normal(4, 1)})
    assert link("Relu", ["x"]) is None
    assert link("Add", ["x", "x"]) is None
    assert link("Add", ["c", "d"], constant) is None
    assert link("Div", ["c", "x"], constant) is None
    assert link("Cast", ["x"], to=TensorProto.INT64) is None


def test_a_dropout_is_free_only_in_inference():
    training = [numpy_helper.from_array(np.array(flag), name) for name, flag in (("yes", True), ("no", False))]
    ratio = tensors({"r": np.asarray(0.5)})
    assert link("Dropout", ["x"]).is_kept is False
    assert link("Dropout", ["x"], opset=9, ratio=0.5) is not None
    assert link("Dropout", ["x"], opset=6, is_test=1) is not None
    assert link("Dropout", ["x", "r", "no"], [*ratio, *training]) is not None
    for node in (("Dropout", ["x", "r", "yes"], [*ratio, *training]), ("Dropout", ["x"], (), 6)):
        with pytest.raises(Refusal, match="Dropout is in training mode"):
            link(*node)


def test_a_division_by_zero_is_left_to_the_proof():
    with np.errstate(all="ignore"):
        factor, _ = link("Div", ["x", "c"], tensors({"c": np.zeros((4, 1))})).affine(3, 1, 4)
    assert math.isinf(factor[0])


@pytest.mark.parametrize(("length", "start"), [(64, "folded into Conv"), (65, "merged with its neighbours")])
def test_a_chain_has_an_end(tmp_path, length, start):
    chain = [helper.make_node("Identity", [f"h{n}"], [f"h{n + 1}"]) for n in range(length)]
    weights = tensors({"w": normal(3, 3, 1, 1), **prefixed(parameters(3))})
    before = [helper.make_node("Conv", ["x", "w"], ["h0"]), *chain, bn_node(f"h{length}")]
    behind = [bn_node("x", "h0"), *chain, helper.make_node("Conv", [f"h{length}", "w"], ["y"])]
    for nodes in (before, behind):
        (change,) = fold_onnx(saved(tmp_path, nodes, weights, (1, 3, 3, 3))).changes.changes
        assert change.after.startswith(start)


@pytest.mark.parametrize("operator", ["Identity", "Cast", "Add"])
def test_nodes_in_a_circle_behind_a_layer(tmp_path, operator):
    """Two nodes make the same tensor, which ONNX does not allow: the only consumers of each output form a circle."""

    def node(source, result):
        extra = {"Cast": {"to": 1}}.get(operator, {})
        return helper.make_node(operator, [source, *(["c"] if operator == "Add" else [])], [result], **extra)

    model = made(
        [bn_node("x", "h"), helper.make_node("Relu", ["x"], ["y"])],
        tensors({"c": np.ones(1), **prefixed(parameters(3))}),
        (1, 3, 3, 3),
    )
    model.graph.node.extend([node("h", "z"), node("z", "h")])
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    try:
        (layer,) = fold_onnx(path).changes.left_alone
        assert layer.reason
    except DamagedFile as err:
        assert "damaged" in str(err)  # noqa: PT017 - either end is right
