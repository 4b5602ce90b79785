import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    KEYS,
    batch_norm,
    bn_node,
    folded,
    info,
    kinds,
    normal,
    parameters,
    prefixed,
    same,
    saved,
    tensors,
    wide,
)

from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def lone(tmp_path, node, values=None, *, initializer=None, shape=(2, 4, 3, 3), **keywords):
    initializer = tensors(prefixed(values or parameters(4))) if initializer is None else initializer
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"])
    weight = tensors({"c.weight": normal(4, 4, 1, 1)})
    path = saved(tmp_path, [conv, node], [*weight, *initializer], shape, **keywords)
    before = path.read_bytes()
    result = fold_onnx(path)
    assert path.read_bytes() == before
    assert result.changes.changes == ()
    (left,) = result.changes.left_alone
    assert onnx.load_from_string(result.content) == onnx.load(path)
    return left.reason


def test_bn_in_training_mode_is_left_alone(tmp_path):
    assert lone(tmp_path, bn_node(training_mode=1)) == "training_mode is 1: it normalises by batch statistics"
    node = bn_node()
    node.output.extend(["m", "v"])
    assert lone(tmp_path, node) == "it has more than one output: it normalises by batch statistics"
    assert lone(tmp_path, node, opset=9).startswith("it has more than one output")


def test_old_bn_that_is_not_for_testing_or_per_position_is_left_alone(tmp_path):
    assert lone(tmp_path, bn_node(is_test=0), opset=6) == "is_test is 0: it normalises by batch statistics"
    assert lone(tmp_path, bn_node(spatial=0), opset=8).startswith("spatial is 0")


def test_parameters_that_are_no_constants_are_left_alone(tmp_path):
    values = prefixed(parameters(4))
    fed = tensors({key: value for key, value in values.items() if key != "bn.bias"})
    path = saved(tmp_path, [bn_node("x")], fed, (2, 4, 3), inputs=[info("bn.bias", (4,))])
    reason = fold_onnx(path).changes.left_alone[0].reason
    assert reason == "its bias 'bn.bias' is computed or fed when the model runs"


def test_wrong_shapes_are_left_alone(tmp_path):
    wrong = tensors(prefixed({**parameters(4), "running_mean": np.zeros((4, 1))}))
    path = saved(tmp_path, [bn_node("x")], wrong, (2, 4, 3))
    assert "not all (C,)" in fold_onnx(path).changes.left_alone[0].reason


def test_a_negative_variance_is_left_alone(tmp_path):
    values = {**parameters(4), "running_var": np.array([1, -1, 1, 1])}
    assert lone(tmp_path, bn_node(), values) == "its scale or shift is not finite in 1 of 4 channels"


def test_epsilon_is_1e_5_where_the_node_has_none(tmp_path):
    x, values = normal(2, 4, 3), {**parameters(4), "running_var": np.full(4, 1e-5)}
    node = helper.make_node("BatchNormalization", ["h", *(f"bn.{key}" for key in KEYS)], ["y"])
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"])
    initializers = tensors({"c.weight": np.eye(4)[:, :, None], **prefixed(values)})
    model, _ = folded(saved(tmp_path, [conv, node], initializers, (2, 4, 3)))
    assert kinds(model) == ["Conv"]
    same(model, x, batch_norm(wide(x).numpy(), values, eps=1e-5))
    with pytest.raises(AssertionError):
        same(model, x, batch_norm(wide(x).numpy(), values, eps=1e-3))
