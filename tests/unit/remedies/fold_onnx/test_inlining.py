import numpy as np
import pytest
from torch.nn.functional import conv2d

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    KEYS,
    batch_norm,
    bn_node,
    folded,
    kinds,
    made,
    normal,
    parameters,
    prefixed,
    same,
    saved,
    tensors,
    wide,
)

from bnlab.remedies.fold_onnx.inlining import inlined  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
PARAMETERS = [f"bn.{key}" for key in KEYS]


def conv_bn():
    nodes = [helper.make_node("Conv", ["a", "w"], ["h"]), bn_node(result="b")]
    return helper.make_function("mine", "Block", ["a", "w", *PARAMETERS], ["b"], nodes, OPSETS)


def call(source, result, number):
    inputs = [source, f"c{number}.weight", *(f"{number}.{key}" for key in KEYS)]
    return helper.make_node("Block", inputs, [result], domain="mine")


def test_one_function_with_the_weights_of_each_call(tmp_path):
    x, weights, values = normal(2, 3, 5, 5), [normal(3, 3, 1, 1), normal(3, 3, 1, 1)], [parameters(3), parameters(3)]
    constants = {"c1.weight": weights[0], "c2.weight": weights[1]}
    constants |= {**prefixed(values[0], "1."), **prefixed(values[1], "2.")}
    path = saved(tmp_path, [call("x", "h", 1), call("h", "y", 2)], tensors(constants), x.shape, functions=[conv_bn()])
    model, changes = folded(path)
    assert kinds(model) == ["Conv", "Conv"]
    assert not model.functions
    assert {change.layer for change in changes.changes} == {"1", "2"}
    hidden = batch_norm(conv2d(wide(x), wide(weights[0])).numpy(), values[0])
    expected = batch_norm(conv2d(wide(hidden.astype(np.float32)), wide(weights[1])).numpy(), values[1])
    same(model, x, expected)
    wrong = batch_norm(conv2d(wide(hidden.astype(np.float32)), wide(weights[0])).numpy(), values[0])
    with pytest.raises(AssertionError):  # the weights of the first call for both
        same(model, x, wrong)


def test_a_conv_and_a_bn_in_functions_of_their_own(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    functions = [
        helper.make_function("mine", "C", ["a", "w"], ["h"], [helper.make_node("Conv", ["a", "w"], ["h"])], OPSETS),
        helper.make_function("mine", "N", ["h", *PARAMETERS], ["b"], [bn_node("h", "b")], OPSETS),
        helper.make_function("mine", "R", ["b"], ["y"], [helper.make_node("Relu", ["b"], ["y"])], OPSETS),
    ]
    nodes = [
        helper.make_node("C", ["x", "c.weight"], ["h"], domain="mine"),
        helper.make_node("N", ["h", *PARAMETERS], ["b"], domain="mine"),
        helper.make_node("R", ["b"], ["y"], domain="mine"),
    ]
    constants = tensors({"c.weight": weight, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, constants, x.shape, functions=functions))
    assert kinds(model) == ["Conv", "R"]  # a function without layers stays
    assert [function.name for function in model.functions] == ["R"]
    same(model, x, np.maximum(batch_norm(conv2d(wide(x), wide(weight)).numpy(), values), 0))


def test_an_attribute_of_the_call(tmp_path):
    node = bn_node(result="b")
    epsilon = next(attribute for attribute in node.attribute if attribute.name == "epsilon")
    epsilon.ClearField("f")
    epsilon.ref_attr_name = "eps"
    nodes = [helper.make_node("Conv", ["a", "w"], ["h"]), node]
    function = helper.make_function("mine", "Block", ["a", "w", *PARAMETERS], ["b"], nodes, OPSETS, ["eps"])
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    block = helper.make_node("Block", ["x", "c.weight", *PARAMETERS], ["y"], domain="mine", eps=0.5)
    constants = tensors({"c.weight": weight, **prefixed(values)})
    model, _ = folded(saved(tmp_path, [block], constants, x.shape, functions=[function]))
    assert kinds(model) == ["Conv"]
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values, eps=0.5))


def test_a_function_stays_where_nothing_can_be_folded(tmp_path):
    nodes = [helper.make_node("Relu", ["a"], ["h"]), bn_node(result="b")]
    function = helper.make_function("mine", "Block", ["a", *PARAMETERS], ["b"], nodes, OPSETS)
    block = helper.make_node("Block", ["x", *PARAMETERS], ["y"], domain="mine")
    path = saved(tmp_path, [block], tensors(prefixed(parameters(3))), (2, 3, 5, 5), functions=[function])
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert len(changes.left_alone) == 1


def test_a_model_without_functions_is_not_copied():
    assert inlined(made([helper.make_node("Relu", ["x"], ["y"])], [], (2, 3))) is None
