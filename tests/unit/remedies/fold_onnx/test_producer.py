from functools import partial

import numpy as np
import pytest
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose2d

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    RANDOM,
    batch_norm,
    bn_node,
    conv_relu_bn,
    folded,
    kinds,
    normal,
    parameters,
    prefixed,
    same,
    saved,
    tensors,
    wide,
)

from bnlab.records import Safety  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")

CONVOLUTIONS = {
    # operator, weight, bias, input, attributes, the same in torch
    "conv": ("Conv", (4, 3, 3, 3), True, (2, 3, 6, 7), {"pads": [1, 1, 1, 1]}, partial(conv2d, padding=1)),
    "no bias": ("Conv", (4, 3, 3, 3), False, (2, 3, 6, 7), {}, conv2d),
    "1d": ("Conv", (4, 3, 3), True, (2, 3, 9), {"strides": [2]}, partial(conv1d, stride=2)),
    "3d": ("Conv", (4, 3, 2, 2, 2), True, (2, 3, 4, 4, 4), {}, conv3d),
    "grouped": ("Conv", (4, 3, 3, 3), True, (2, 6, 5, 5), {"group": 2}, partial(conv2d, groups=2)),
    "depthwise": ("Conv", (6, 1, 3, 3), False, (2, 6, 5, 5), {"group": 6}, partial(conv2d, groups=6)),
    "transposed": (
        *("ConvTranspose", (3, 4, 2, 2), True, (2, 3, 3, 4), {"strides": [2, 2]}),
        partial(conv_transpose2d, stride=2),
    ),
    "transposed, grouped": (
        *("ConvTranspose", (6, 2, 3, 3), True, (2, 6, 4, 4), {"group": 3}),
        partial(conv_transpose2d, groups=3),
    ),
    "transposed, grouped, no bias": (
        *("ConvTranspose", (4, 3, 3, 3), False, (2, 4, 4, 4), {"group": 2}),
        partial(conv_transpose2d, groups=2),
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_takes_the_bn_behind_it(tmp_path, case):
    kind, shape, has_bias, in_shape, attributes, in_torch = CONVOLUTIONS[case]
    x, weight = normal(*in_shape), normal(*shape)
    channels = shape[1] * attributes.get("group", 1) if kind == "ConvTranspose" else shape[0]
    bias, values = normal(channels) if has_bias else None, parameters(channels)
    linear = helper.make_node(kind, ["x", "conv.weight", *(["conv.bias"] if has_bias else [])], ["h"], **attributes)
    initializers = {"conv.weight": weight, **({"conv.bias": bias} if has_bias else {}), **prefixed(values)}
    path = saved(tmp_path, [linear, bn_node()], tensors(initializers), in_shape)
    model, changes = folded(path)
    assert kinds(model) == [kind]
    hidden = in_torch(wide(x), wide(weight), wide(bias)).numpy()
    same(model, x, batch_norm(hidden, values))
    assert [(c.layer, c.what, c.before, c.after) for c in changes.changes] == [
        ("bn", "batch norm", "BatchNormalization", f"folded into {kind} conv")
    ]
    assert (changes.action, changes.safety, changes.left_alone) == ("fold", Safety.EXACT, ())
    assert [(m.layer, m.what, m.unit) for m in changes.measurements] == [
        ("bn", "largest error", "of the largest output"),
        (None, "largest error", "of the largest output"),
    ]
    assert all(0 <= m.value < 1e-5 for m in changes.measurements)
    # The oracle tells a fold that forgot eps, and one that mixed up the channels of a group.
    with pytest.raises(AssertionError):
        same(model, x, batch_norm(hidden, values, eps=0))
    with pytest.raises(AssertionError):
        same(model, x, batch_norm(hidden, {key: np.roll(value, 1) for key, value in values.items()}))


@pytest.mark.parametrize("is_transposed", [0, 1])
@pytest.mark.parametrize("bias_shape", [None, (), (1,), (4,), (1, 4), (2, 4), (2, 1)])
def test_a_gemm_takes_it_with_alpha_beta_and_any_bias(tmp_path, is_transposed, bias_shape):
    x, weight, values = normal(2, 5), normal(5, 4), parameters(4)
    bias = None if bias_shape is None else normal(*bias_shape)
    inputs = ["x", "fc.weight", *([] if bias is None else ["fc.bias"])]
    linear = helper.make_node("Gemm", inputs, ["h"], alpha=0.5, beta=-3.0, transB=is_transposed)
    initializers = {"fc.weight": weight.T if is_transposed else weight, **prefixed(values)}
    initializers |= {} if bias is None else {"fc.bias": np.asarray(bias)}
    model, changes = folded(saved(tmp_path, [linear, bn_node()], tensors(initializers), (2, 5)))
    assert kinds(model) == ["Gemm"]
    assert changes.changes[0].after == "folded into Gemm fc"
    product = 0.5 * (x.astype(np.float32).astype(float) @ wide(weight).numpy())
    hidden = product if bias is None else product - 3 * wide(bias).numpy()
    same(model, x, batch_norm(hidden, values))
    with pytest.raises(AssertionError):
        same(model, x, batch_norm(2 * product, values))


def test_a_gemm_may_read_its_input_turned(tmp_path):
    x, weight, values = normal(5, 2), normal(5, 4), parameters(4)
    linear = helper.make_node("Gemm", ["x", "fc.weight"], ["h"], transA=1)
    model, _ = folded(saved(tmp_path, [linear, bn_node()], tensors({"fc.weight": weight, **prefixed(values)}), (5, 2)))
    same(model, x, batch_norm(x.astype(np.float32).T @ wide(weight).numpy(), values))


def test_a_matrix_product_becomes_a_gemm(tmp_path):
    x, weight, values = normal(2, 5), normal(5, 4), parameters(4)
    linear = helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "fc")
    model, changes = folded(
        saved(tmp_path, [linear, bn_node()], tensors({"fc.weight": weight, **prefixed(values)}), (2, 5))
    )
    assert kinds(model) == ["Gemm"]
    assert changes.changes[0].after == "folded into MatMul fc, now a Gemm"
    same(model, x, batch_norm(x.astype(np.float32) @ wide(weight).numpy(), values))


def test_a_matrix_product_of_three_dimensions_has_its_channels_elsewhere(tmp_path):
    x, weight, values = normal(2, 4, 5), normal(5, 4), parameters(4)
    linear = helper.make_node("MatMul", ["x", "fc.weight"], ["h"], "fc")
    model, changes = folded(
        saved(tmp_path, [linear, bn_node()], tensors({"fc.weight": weight, **prefixed(values)}), (2, 4, 5))
    )
    assert model == onnx.load(tmp_path / "m.onnx")
    hidden = x.astype(np.float32) @ wide(weight).numpy()
    same(model, x, batch_norm(hidden, values))
    with pytest.raises(AssertionError):  # what folding along the last axis would give
        same(model, x, batch_norm(hidden.transpose(0, 2, 1), values).transpose(0, 2, 1))
    assert "axis 1 of the output of MatMul, which the BN normalises, is no output" in changes.left_alone[0].reason


def test_a_chain_of_two(tmp_path):
    x, weight, first, second = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4), parameters(4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="i", prefix="a."),
        bn_node(source="i", prefix="b."),
    ]
    initializers = {"c.weight": weight, **prefixed(first, "a."), **prefixed(second, "b.")}
    model, changes = folded(saved(tmp_path, nodes, tensors(initializers), (2, 3, 5, 5)))
    assert kinds(model) == ["Conv"]
    assert [change.layer for change in changes.changes] == ["a", "b"]
    same(model, x, batch_norm(batch_norm(conv2d(wide(x), wide(weight)).numpy(), first), second))


def test_pairs_come_from_the_data_flow_not_from_the_order(tmp_path):
    x, one, two = normal(2, 3, 5, 5), normal(3, 3, 1, 1), normal(3, 3, 1, 1)
    first, second = parameters(3), parameters(3)
    nodes = [
        helper.make_node("Conv", ["x", "c1.weight"], ["h1"]),
        helper.make_node("Conv", ["x", "c2.weight"], ["h2"]),
        bn_node("h1", "y1", "b1."),
        bn_node("h2", "y2", "b2."),
        helper.make_node("Sub", ["y1", "y2"], ["y"]),
    ]
    initializers = {"c1.weight": one, "c2.weight": two, **prefixed(first, "b1."), **prefixed(second, "b2.")}
    model, changes = folded(saved(tmp_path, nodes, tensors(initializers), (2, 3, 5, 5)))
    assert [change.after for change in changes.changes] == ["folded into Conv c1", "folded into Conv c2"]

    def expected(a, b):
        return batch_norm(conv2d(wide(x), wide(one)).numpy(), a) - batch_norm(conv2d(wide(x), wide(two)).numpy(), b)

    same(model, x, expected(first, second))
    with pytest.raises(AssertionError):
        same(model, x, expected(second, first))


def test_it_is_not_folded_across_a_relu(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    model, changes = folded(saved(tmp_path, *conv_relu_bn(values, weight), (2, 3, 5, 5)))
    assert model == onnx.load(tmp_path / "m.onnx")  # a Mul and an Add would be one node more
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, batch_norm(np.maximum(hidden, 0), values))
    with pytest.raises(AssertionError):  # mmcv's answer
        same(model, x, np.maximum(batch_norm(hidden, values), 0))
    assert changes.changes == changes.notes == ()
    assert changes.left_alone[0].reason.startswith("Relu feeds it; its output is an output of the graph; ")


def test_a_producer_that_feeds_something_else_too_is_kept(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    path = saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), (2, 3, 5, 5))
    model, changes = folded(path)
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, hidden + batch_norm(hidden, values))
    with pytest.raises(AssertionError):  # torch.fx's answer: the other consumer gets the folded one
        same(model, x, 2 * batch_norm(hidden, values))
    assert "the Conv that feeds it feeds another node too" in changes.left_alone[0].reason


def test_a_producer_whose_output_is_an_output_is_kept(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": weight, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 3, 5, 5), outputs=("h", "y")))
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, hidden, "h")
    same(model, x, batch_norm(hidden, values))
    assert "the output of the Conv that feeds it is an output of the graph" in changes.left_alone[0].reason


def test_a_weight_that_is_computed_is_not_folded_into(tmp_path):
    values = parameters(4)
    nodes = [
        helper.make_node("Neg", ["w"], ["c.weight"]),
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(),
    ]
    model, changes = folded(
        saved(tmp_path, nodes, tensors({"w": normal(4, 3, 1, 1), **prefixed(values)}), (2, 3, 4, 4))
    )
    assert model == onnx.load(tmp_path / "m.onnx")
    assert "'c.weight' is computed or fed when the model runs" in changes.left_alone[0].reason


def add_chain(*kinds):
    """Return nodes from h to i that keep the channels apart, with the same in numpy, and their constants."""
    values = {
        "c0": normal(4, 1, 1),
        "c1": normal(1, 4, 1, 1),
        "c2": np.asarray(0.7),
        "c3": RANDOM.uniform(1, 2, (4, 1, 1)),
    }
    steps = {
        "Add": (["h", "c0"], lambda h: h + values["c0"]),
        "Add first": (["c1", "h"], lambda h: values["c1"] + h),
        "Sub": (["h", "c2"], lambda h: h - values["c2"]),
        "Sub from": (["c1", "h"], lambda h: values["c1"] - h),
        "Mul": (["c3", "h"], lambda h: values["c3"] * h),
        "Div": (["h", "c3"], lambda h: h / values["c3"]),
        "Identity": (["h"], lambda h: h),
        "Dropout": (["h"], lambda h: h),
    }
    nodes, functions = [], []
    for number, kind in enumerate(kinds):
        inputs, function = steps[kind]
        source = "h" if number == 0 else f"i{number}"
        result = "i" if number == len(kinds) - 1 else f"i{number + 1}"
        nodes.append(helper.make_node(kind.split()[0], [source if name == "h" else name for name in inputs], [result]))
        functions.append(function)
    used = {name for node in nodes for name in node.input} & {*values}
    return nodes, functions, {name: values[name] for name in used}


@pytest.mark.parametrize(
    "kinds_between",
    [["Add"], ["Add first"], ["Sub"], ["Sub from"], ["Mul"], ["Div"], ["Identity"], ["Dropout", "Sub from", "Div"]],
)
@pytest.mark.parametrize("opset", [9, 13, 21])
def test_nodes_between_that_keep_channels_apart(tmp_path, kinds_between, opset):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes, functions, constants = add_chain(*kinds_between)
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"])
    initializers = tensors({"c.weight": weight, **constants, **prefixed(values)})
    path = saved(tmp_path, [conv, *nodes, bn_node("i")], initializers, x.shape, opset=opset)
    model, changes = folded(path)
    assert kinds(model) == ["Conv"]
    assert changes.changes[0].after == "folded into Conv c"
    hidden = conv2d(wide(x), wide(weight)).numpy()
    for function in functions:
        hidden = function(hidden)
    same(model, x, batch_norm(hidden, values))
    assert len(model.graph.initializer) == 2  # the constants between are gone


def test_a_constant_per_position_stays_where_it_is(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        helper.make_node("Add", ["h", "p"], ["i"]),
        bn_node("i"),
    ]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), "p": normal(3, 3), **prefixed(parameters(4))})
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 3, 5, 5)))
    assert model == onnx.load(tmp_path / "m.onnx")
    assert "Add has a constant of shape (3, 3), which is not one value per channel" in changes.left_alone[0].reason


def test_a_matrix_product_across_a_transpose(tmp_path):
    x, weight, bias, values = normal(2, 5, 6), normal(6, 4), normal(4), parameters(4)
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"]),
        helper.make_node("Add", ["fc.bias", "h"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
        bn_node("t"),
    ]
    initializers = tensors({"fc.weight": weight, "fc.bias": bias, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, initializers, x.shape))
    assert kinds(model) == ["MatMul", "Add", "Transpose"]
    assert changes.changes[0].after == "folded into MatMul fc, with an Add behind it"
    hidden = x.astype(np.float32) @ wide(weight).numpy() + wide(bias).numpy()
    same(model, x, batch_norm(hidden.transpose(0, 2, 1), values))


def test_a_matrix_product_with_the_weight_on_the_left(tmp_path):
    x, weight, values = normal(2, 6, 5), normal(4, 6), parameters(4)
    nodes = [helper.make_node("MatMul", ["fc.weight", "x"], ["h"]), bn_node()]
    model, _ = folded(saved(tmp_path, nodes, tensors({"fc.weight": weight, **prefixed(values)}), x.shape))
    assert kinds(model) == ["MatMul", "Add"]
    same(model, x, batch_norm(wide(weight).numpy() @ x.astype(np.float32), values))


@pytest.mark.parametrize("opset", [9, 17])
def test_axes_that_are_added_and_removed(tmp_path, opset):
    x, weight, values = normal(5, 6), normal(6, 4), parameters(4)
    axes = {"axes": [2]} if opset < 13 else {}
    more = [] if axes else ["axes"]
    nodes = [
        helper.make_node("Gemm", ["x", "fc.weight"], ["h"]),
        helper.make_node("Unsqueeze", ["h", *more], ["u"], **axes),
        bn_node("u", "b"),
        helper.make_node("Squeeze", ["b", *more], ["y"], **axes),
    ]
    initializers = tensors({"fc.weight": weight, **prefixed(values)})
    initializers += [] if axes else [numpy_helper.from_array(np.array([2]), "axes")]
    model, _ = folded(saved(tmp_path, nodes, initializers, x.shape, opset=opset))
    assert kinds(model) == ["Gemm", "Unsqueeze", "Squeeze"]
    same(model, x, batch_norm(x.astype(np.float32) @ wide(weight).numpy(), values))
