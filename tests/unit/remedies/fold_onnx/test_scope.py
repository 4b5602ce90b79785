import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    batch_norm,
    bn_node,
    folded,
    info,
    kinds,
    names,
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


def test_a_use_inside_a_subgraph_is_a_use(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    branch = helper.make_graph([helper.make_node("Neg", ["h"], ["n"])], "then", [], [info("n", None)])
    other = helper.make_graph([helper.make_node("Neg", ["b"], ["m"])], "else", [], [info("m", None)])
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=other),
        helper.make_node("Add", ["i", "b"], ["y"]),
    ]
    yes = numpy_helper.from_array(np.array(True), "yes")
    initializers = [yes, *tensors({"c.weight": weight, **prefixed(values)})]
    model, _ = folded(saved(tmp_path, nodes, initializers, (2, 3, 5, 5)))
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, batch_norm(hidden, values) - hidden)


def test_a_shared_weight_is_not_changed_for_the_other_node(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(3, 3, 1, 1), parameters(3)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight", "c.bias"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Conv", ["b", "c.weight", "c.bias"], ["y"]),
    ]
    bias = normal(3)
    initializers = tensors({"c.weight": weight, "c.bias": bias, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, initializers, (2, 3, 5, 5)))
    assert kinds(model) == ["Conv", "Conv"]

    def conv(value):
        return conv2d(wide(value), wide(weight), wide(bias)).numpy()

    hidden = conv2d(wide(x), wide(weight), wide(bias))
    expected = conv2d(torch.from_numpy(batch_norm(hidden.numpy(), values)), wide(weight), wide(bias)).numpy()
    same(model, x, expected)
    assert set(names(model.graph.initializer)) == {"c.weight", "c.bias", "bn.folded_weight", "bn.folded_bias"}


def test_constants_from_nodes_are_read_and_swept(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    values = {**values, "running_var": np.full(4, 0.25), "running_mean": np.zeros(4)}
    (stored,) = tensors({"w": weight})
    quarter = numpy_helper.from_array(np.array([0.25], dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], ["w0"], value=stored),
        helper.make_node("Identity", ["w0"], ["c.weight"]),
        helper.make_node("ConstantOfShape", ["four"], ["bn.running_var"], value=quarter),
        helper.make_node("ConstantOfShape", ["four"], ["bn.running_mean"]),
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(),
    ]
    four = numpy_helper.from_array(np.array([4], dtype=np.int64), "four")
    kept = tensors({key: value for key, value in prefixed(values).items() if key in ("bn.weight", "bn.bias")})
    unused = tensors({"unused": np.zeros(2)})
    model, _ = folded(saved(tmp_path, nodes, [four, *kept, *unused], (2, 3, 5, 5)))
    assert kinds(model) == ["Conv"]
    # What nothing used before is none of our business.
    assert names(model.graph.initializer) == ["unused", "bn.folded_weight", "bn.folded_bias"]
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def listed(initializers, only=None):
    return [info(tensor.name, tuple(tensor.dims)) for tensor in initializers if only is None or tensor.name in only]


def test_initializers_are_inputs_of_old_models(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    initializers = tensors({"c.weight": weight, **prefixed(values)})
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    for ir in (3, 4):
        path = saved(tmp_path, nodes, initializers, (2, 3, 5, 5), ir=ir, opset=8, inputs=listed(initializers))
        model, changes = folded(path)
        same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))
        bias = ["bn.folded_bias"] if ir == 3 else []  # where every initializer must be an input
        assert names(model.graph.input) == ["x", "c.weight", *bias]
        assert any("taken as constants" in note for note in changes.notes)


@pytest.mark.parametrize("name", ["bn.bias", "c.weight"])
def test_an_initializer_a_caller_may_replace_is_no_constant(tmp_path, name):
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    path = saved(tmp_path, nodes, initializers, (2, 3, 5, 5), ir=8, inputs=listed(initializers, [name]))
    model, changes = folded(path)
    text = " ".join([*changes.notes, *(left.reason for left in changes.left_alone)])
    assert f"{name!r} is a graph input with a default, which a caller may replace" in text
    assert kinds(model)[0] == "Conv"
    assert name in names(model.graph.input)


def branch_of(values, weight, *, inside):
    initializers = tensors({"ic.weight": weight, **prefixed(values, "i.")})
    nodes = [helper.make_node("Conv", ["x", "ic.weight"], ["ih"]), bn_node("ih", "iy", "i.")]
    branch = helper.make_graph(nodes, "then", [], [info("iy", None)], initializer=initializers if inside else [])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "else", [], [info("n", None)])
    yes = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)
    return [node], [yes, *([] if inside else initializers)]


def test_a_bn_inside_a_subgraph(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(3, 3, 1, 1), parameters(3)
    model, changes = folded(saved(tmp_path, *branch_of(values, weight, inside=True), (2, 3, 5, 5)))
    inner = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in inner.node] == ["Conv"]
    assert [change.layer for change in changes.changes] == ["i"]
    assert changes.measurements[0].value < 1e-5
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_a_bn_inside_a_subgraph_with_weights_outside(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(3, 3, 1, 1), parameters(3)
    model, _ = folded(saved(tmp_path, *branch_of(values, weight, inside=False), (2, 3, 5, 5)))
    inner = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in inner.node] == ["Conv"]
    assert names(model.graph.initializer) == ["yes"]
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_a_bn_inside_a_function(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in tensors({"f.weight": weight, **prefixed(values)})
    ]
    body = [*constants, helper.make_node("Conv", ["a", "f.weight"], ["h"]), bn_node(result="b")]
    function = helper.make_function("mine", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    call = helper.make_node("Block", ["x"], ["y"], domain="mine")
    model, changes = folded(saved(tmp_path, [call], [], (2, 3, 5, 5), functions=[function]))
    assert [node.op_type for node in model.functions[0].node] == ["Constant", "Constant", "Conv"]
    assert [change.layer for change in changes.changes] == ["bn"]
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_an_attribute_from_the_call_of_a_function_is_not_known(tmp_path):
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors(prefixed(parameters(4)))]
    node = bn_node("a", "b")
    epsilon = next(attribute for attribute in node.attribute if attribute.name == "epsilon")
    epsilon.ClearField("f")
    epsilon.ref_attr_name = "eps"
    function = helper.make_function(
        "mine", "Block", ["a"], ["b"], [*constants, node], [helper.make_opsetid("", 17)], ["eps"]
    )
    call = helper.make_node("Block", ["x"], ["y"], domain="mine", eps=0.5)
    path = saved(tmp_path, [call], [], (2, 4, 5), functions=[function])
    assert "takes an attribute from the call" in fold_onnx(path).changes.left_alone[0].reason
