import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose2d, pad

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from bnlab.errors import DamagedFile, MissingPackage, NoBatchNorm, NotACheckpoint, UnreadableFile, UsageError  # noqa: E402
from bnlab.records import Changes, Safety  # noqa: E402
from bnlab.remedies.fold_onnx import pairs as _onnx_pairs  # noqa: E402
from bnlab.remedies.fold_onnx import proof as _onnx_proof  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402
from bnlab.remedies.fold_onnx.run import CannotRun, difference, run_model  # noqa: E402

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
    found = run_model(model, {"x": x.astype(np.float32)})[output]
    error = difference(np.asarray(expected), found)
    assert error < tolerance, error


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
    given = {"conv.weight": weight, **({"conv.bias": bias} if has_bias else {}), **prefixed(values)}
    path = saved(tmp_path, [linear, bn_node()], tensors(given), in_shape)
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


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("bias_shape", [None, (), (1,), (4,), (1, 4), (2, 4), (2, 1)])
def test_a_gemm_takes_it_with_alpha_beta_and_any_bias(tmp_path, turned, bias_shape):
    x, weight, values = normal(2, 5), normal(5, 4), parameters(4)
    bias = None if bias_shape is None else normal(*bias_shape)
    inputs = ["x", "fc.weight", *([] if bias is None else ["fc.bias"])]
    linear = helper.make_node("Gemm", inputs, ["h"], alpha=0.5, beta=-3.0, transB=turned)
    given = {"fc.weight": weight.T if turned else weight, **prefixed(values)}
    given |= {} if bias is None else {"fc.bias": np.asarray(bias)}
    model, changes = folded(saved(tmp_path, [linear, bn_node()], tensors(given), (2, 5)))
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
    assert kinds(model) == ["MatMul", "Mul", "Add"]
    hidden = x.astype(np.float32) @ wide(weight).numpy()
    same(model, x, batch_norm(hidden, values))
    with pytest.raises(AssertionError):  # what folding along the last axis would give
        same(model, x, batch_norm(hidden.transpose(0, 2, 1), values).transpose(0, 2, 1))
    assert "the output of MatMul is not known to have 2 dimensions" in changes.notes[0]


def test_a_chain_of_two(tmp_path):
    x, weight, first, second = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4), parameters(4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="i", prefix="a."),
        bn_node(source="i", prefix="b."),
    ]
    given = {"c.weight": weight, **prefixed(first, "a."), **prefixed(second, "b.")}
    model, changes = folded(saved(tmp_path, nodes, tensors(given), (2, 3, 5, 5)))
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
    given = {"c1.weight": one, "c2.weight": two, **prefixed(first, "b1."), **prefixed(second, "b2.")}
    model, changes = folded(saved(tmp_path, nodes, tensors(given), (2, 3, 5, 5)))
    assert [change.after for change in changes.changes] == ["folded into Conv c1", "folded into Conv c2"]

    def expected(a, b):
        return batch_norm(conv2d(wide(x), wide(one)).numpy(), a) - batch_norm(conv2d(wide(x), wide(two)).numpy(), b)

    same(model, x, expected(first, second))
    with pytest.raises(AssertionError):
        same(model, x, expected(second, first))


def conv_relu_bn(values, weight):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        bn_node("r"),
    ]
    return nodes, tensors({"c.weight": weight, **prefixed(values)})


def test_it_is_not_folded_across_a_relu(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    model, changes = folded(saved(tmp_path, *conv_relu_bn(values, weight), (2, 3, 5, 5)))
    assert kinds(model) == ["Conv", "Relu", "Mul", "Add"]
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, batch_norm(np.maximum(hidden, 0), values))
    with pytest.raises(AssertionError):  # mmcv's answer
        same(model, x, np.maximum(batch_norm(hidden, values), 0))
    assert [change.after for change in changes.changes] == ["Mul and Add"]
    assert changes.notes == ("bn became Mul and Add: Relu feeds it; its output is an output of the graph",)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert shapes == {"c.weight": (4, 3, 3, 3), "bn.scale": (4, 1, 1), "bn.shift": (4, 1, 1)}


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
    assert "the Conv that feeds it feeds something else, too" in changes.notes[0]


def test_a_producer_whose_output_is_an_output_is_kept(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    given = tensors({"c.weight": weight, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, given, (2, 3, 5, 5), outputs=("h", "y")))
    hidden = conv2d(wide(x), wide(weight)).numpy()
    same(model, x, hidden, "h")
    same(model, x, batch_norm(hidden, values))
    assert "the output of the Conv that feeds it is an output of the graph" in changes.notes[0]


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
    given = [yes, *tensors({"c.weight": weight, **prefixed(values)})]
    model, _ = folded(saved(tmp_path, nodes, given, (2, 3, 5, 5)))
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
    given = tensors({"c.weight": weight, "c.bias": bias, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, given, (2, 3, 5, 5)))
    assert kinds(model) == ["Conv", "Conv"]

    def conv(value):
        return conv2d(wide(value), wide(weight), wide(bias)).numpy()

    hidden = conv2d(wide(x), wide(weight), wide(bias))
    expected = conv2d(torch.from_numpy(batch_norm(hidden.numpy(), values)), wide(weight), wide(bias)).numpy()
    same(model, x, expected)
    assert set(names(model.graph.initializer)) == {"c.weight", "c.bias", "bn.folded_weight", "bn.folded_bias"}


PADS_WITHOUT_BEING_ASKED = tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 18)
VALID = pytest.param(
    {"auto_pad": "VALID"},
    marks=pytest.mark.skipif(PADS_WITHOUT_BEING_ASKED, reason="the evaluator of onnx 1.17 pads a Conv that is VALID"),
)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [{}, {"pads": [0, 0, 0, 0]}, VALID])
def test_a_bn_goes_into_the_convolution_behind_it(tmp_path, groups, padding):
    x, weight, bias, values = normal(2, 4, 5, 5), normal(6, 4 // groups, 3, 3), normal(6), parameters(4)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Conv", ["b", "c.weight", "c.bias"], ["y"], group=groups, **padding),
    ]
    given = tensors({"c.weight": weight, "c.bias": bias, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, given, (2, 4, 5, 5)))
    assert kinds(model) == ["Relu", "Conv"]
    assert changes.changes[0].after == "folded into Conv c behind it"
    normalised = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), values))
    same(model, x, conv2d(normalised, wide(weight), wide(bias), groups=groups).numpy())
    unshifted = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), {**values, "bias": np.zeros(4)}))
    with pytest.raises(AssertionError):  # the shift forgotten
        same(model, x, conv2d(unshifted, wide(weight), wide(bias), groups=groups).numpy())


@pytest.mark.parametrize("turned", [0, 1])
def test_a_bn_goes_into_the_gemm_behind_it(tmp_path, turned):
    x, weight, bias, values = normal(2, 5), normal(5, 4), normal(4), parameters(5)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Gemm", ["b", "c.weight", "c.bias"], ["y"], alpha=2.0, beta=0.5, transB=turned),
    ]
    given = tensors({"c.weight": weight.T if turned else weight, "c.bias": bias, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, given, (2, 5)))
    assert kinds(model) == ["Relu", "Gemm"]
    normalised = batch_norm(np.maximum(wide(x).numpy(), 0), values)
    same(model, x, 2 * normalised @ wide(weight).numpy() + 0.5 * wide(bias).numpy())


@pytest.mark.parametrize("padding", [{"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}, {"pads": [0, 0, 1, 0]}])
def test_padding_behind_the_bn_is_zeros_after_it_not_before(tmp_path, padding):
    x, weight, values = normal(2, 4, 5, 5), normal(6, 4, 3, 3), parameters(4)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Conv", ["b", "c.weight"], ["y"], **padding),
    ]
    given = tensors({"c.weight": weight, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, given, (2, 4, 5, 5)))
    assert kinds(model) == ["Relu", "Mul", "Add", "Conv"]
    normalised = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), values))
    ends = padding.get("pads", [1, 1, 1, 1])
    padded = pad(normalised, (ends[1], ends[3], ends[0], ends[2]))
    same(model, x, conv2d(padded, wide(weight)).numpy())
    assert "the Conv behind it pads with zeros" in changes.notes[0]


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 3), (2, 4, 3, 2, 2)])
def test_a_lone_bn_becomes_mul_and_add_in_every_rank(tmp_path, shape):
    x, values = normal(*shape), parameters(4)
    model, _ = folded(saved(tmp_path, [bn_node("x")], tensors(prefixed(values)), shape))
    assert kinds(model) == ["Mul", "Add"]
    same(model, x, batch_norm(wide(x).numpy(), values))


def test_without_a_known_rank_it_is_left_alone(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "s"], ["h"]), bn_node()]
    shape = info("s", ["n"], TensorProto.INT64)
    path = saved(tmp_path, nodes, tensors(prefixed(parameters(4))), (2, 4, 3), inputs=[shape])
    model, changes = folded(path, example={"x": normal(2, 4, 3), "s": np.array([2, 4, 3])})
    assert kinds(model) == ["Reshape", "BatchNormalization"]
    assert changes.changes == ()
    assert "the number of dimensions of its input is not known" in changes.left_alone[0].reason


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
    assert lone(tmp_path, bn_node(), opset=6) == "is_test is 0: it normalises by batch statistics"
    assert lone(tmp_path, bn_node(spatial=0), opset=8).startswith("spatial is 0")


def test_parameters_that_are_no_constants_are_left_alone(tmp_path):
    values = prefixed(parameters(4))
    fed = tensors({key: value for key, value in values.items() if key != "bn.bias"})
    path = saved(tmp_path, [bn_node("x")], fed, (2, 4, 3), inputs=[info("bn.bias", (4,))])
    reason = fold_onnx(path).changes.left_alone[0].reason
    assert reason == "its bias 'bn.bias' is computed or fed when the model runs"


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
    assert kinds(model) == ["Neg", "Conv", "Mul", "Add"]
    assert "'c.weight' is computed or fed when the model runs" in changes.notes[0]


def test_bfloat16_and_wrong_shapes_are_left_alone(tmp_path):
    wrong = tensors(prefixed({**parameters(4), "running_mean": np.zeros((4, 1))}))
    path = saved(tmp_path, [bn_node("x")], wrong, (2, 4, 3))
    assert "not all (C,)" in fold_onnx(path).changes.left_alone[0].reason
    half = [helper.make_tensor(f"bn.{key}", TensorProto.BFLOAT16, (4,), [1.0] * 4) for key in KEYS]
    path = saved(tmp_path, [bn_node("x")], half, (2, 4, 3), kind=TensorProto.BFLOAT16)
    assert "bfloat16" in fold_onnx(path).changes.left_alone[0].reason


def test_a_negative_variance_is_left_alone(tmp_path):
    values = {**parameters(4), "running_var": np.array([1, -1, 1, 1])}
    assert lone(tmp_path, bn_node(), values) == "its scale or shift is not finite in 1 of 4 channels"


def test_epsilon_is_1e_5_where_the_node_has_none(tmp_path):
    x, values = normal(2, 4, 3), {**parameters(4), "running_var": np.full(4, 1e-5)}
    node = helper.make_node("BatchNormalization", ["x", *(f"bn.{key}" for key in KEYS)], ["y"])
    model, _ = folded(saved(tmp_path, [node], tensors(prefixed(values)), (2, 4, 3)))
    same(model, x, batch_norm(wide(x).numpy(), values, eps=1e-5))
    with pytest.raises(AssertionError):
        same(model, x, batch_norm(wide(x).numpy(), values, eps=1e-3))


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 17])
def test_every_opset_with_broadcasting(tmp_path, opset):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    plain = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    with_relu, given = conv_relu_bn(values, weight)
    for nodes in (plain, with_relu):
        model, changes = folded(saved(tmp_path, nodes, given, (2, 3, 5, 5), opset=opset))
        assert "BatchNormalization" not in kinds(model)
        assert changes.measurements[-1].value < 1e-5
        hidden = conv2d(wide(x), wide(weight)).numpy()
        same(model, x, batch_norm(hidden if nodes is plain else np.maximum(hidden, 0), values))


def test_opset_6_folds_into_conv_and_has_no_broadcasting_for_the_rest(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node(is_test=1)]
    model, _ = folded(saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), x.shape, opset=6))
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))
    path = saved(tmp_path, [bn_node("x", is_test=1)], tensors(prefixed(parameters(3))), x.shape, opset=6)
    assert "Mul and Add do not broadcast in opset 6" in fold_onnx(path).changes.left_alone[0].reason


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


def listed(given, only=None):
    return [info(tensor.name, tuple(tensor.dims)) for tensor in given if only is None or tensor.name in only]


def test_initializers_are_inputs_of_old_models(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    given = tensors({"c.weight": weight, **prefixed(values)})
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    for ir in (3, 4):
        path = saved(tmp_path, nodes, given, (2, 3, 5, 5), ir=ir, opset=8, inputs=listed(given))
        model, changes = folded(path)
        same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))
        bias = ["bn.folded_bias"] if ir == 3 else []  # where every initializer must be an input
        assert names(model.graph.input) == ["x", "c.weight", *bias]
        assert any("taken as constants" in note for note in changes.notes)


@pytest.mark.parametrize("name", ["bn.bias", "c.weight"])
def test_an_initializer_a_caller_may_replace_is_no_constant(tmp_path, name):
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    path = saved(tmp_path, nodes, given, (2, 3, 5, 5), ir=8, inputs=listed(given, [name]))
    model, changes = folded(path)
    said = " ".join([*changes.notes, *(left.reason for left in changes.left_alone)])
    assert f"{name!r} is a graph input with a default, which a caller may replace" in said
    assert kinds(model)[0] == "Conv"
    assert name in names(model.graph.input)


def branch_of(values, weight, *, inside):
    given = tensors({"ic.weight": weight, **prefixed(values, "i.")})
    nodes = [helper.make_node("Conv", ["x", "ic.weight"], ["ih"]), bn_node("ih", "iy", "i.")]
    branch = helper.make_graph(nodes, "then", [], [info("iy", None)], initializer=given if inside else [])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "else", [], [info("n", None)])
    yes = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)
    return [node], [yes, *([] if inside else given)]


def test_a_bn_inside_a_subgraph(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(3, 3, 1, 1), parameters(3)
    model, changes = folded(saved(tmp_path, *branch_of(values, weight, inside=True), (2, 3, 5, 5)))
    inner = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in inner.node] == ["Conv"]
    assert [change.layer for change in changes.changes] == ["i"]
    assert changes.measurements[0].value < 1e-5
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_a_bn_inside_a_subgraph_with_parameters_outside_is_left_alone(tmp_path):
    path = saved(tmp_path, *branch_of(parameters(3), normal(3, 3, 1, 1), inside=False), (2, 3, 5, 5))
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert changes.left_alone[0].reason == "its weight 'i.weight' lies outside the subgraph"


def test_a_bn_inside_a_function(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    held = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in tensors({"f.weight": weight, **prefixed(values)})
    ]
    body = [*held, helper.make_node("Conv", ["a", "f.weight"], ["h"]), bn_node(result="b")]
    function = helper.make_function("mine", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    call = helper.make_node("Block", ["x"], ["y"], domain="mine")
    model, changes = folded(saved(tmp_path, [call], [], (2, 3, 5, 5), functions=[function]))
    assert [node.op_type for node in model.functions[0].node] == ["Constant", "Constant", "Conv"]
    assert [change.layer for change in changes.changes] == ["bn"]
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_an_attribute_from_the_call_of_a_function_is_not_known(tmp_path):
    held = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors(prefixed(parameters(4)))]
    node = bn_node("a", "b")
    epsilon = next(attribute for attribute in node.attribute if attribute.name == "epsilon")
    epsilon.ClearField("f")
    epsilon.ref_attr_name = "eps"
    function = helper.make_function(
        "mine", "Block", ["a"], ["b"], [*held, node], [helper.make_opsetid("", 17)], ["eps"]
    )
    call = helper.make_node("Block", ["x"], ["y"], domain="mine", eps=0.5)
    path = saved(tmp_path, [call], [], (2, 4, 5), functions=[function])
    assert "takes an attribute from the call" in fold_onnx(path).changes.left_alone[0].reason


def test_the_rest_of_the_model_is_kept_byte_by_byte(tmp_path):
    weight, values = normal(4, 3, 3, 3), parameters(4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("LeakyRelu", ["b"], ["r"], "act", alpha=0.3),
        helper.make_node("Mul", ["r", "k"], ["y"]),
    ]
    model = made(nodes, tensors({"c.weight": weight, **prefixed(values), "k": [2.0]}), ("n", 3, 5, 5))
    model.producer_name, model.doc_string = "somebody", "about"
    helper.set_model_props(model, {"author": "somebody"})
    model.graph.value_info.extend([info("h", None), info("b", None), info("r", None)])
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    after, _ = folded(path)
    assert [n.SerializeToString() for n in after.graph.node[1:]] == [n.SerializeToString() for n in nodes[2:]]
    assert names(after.graph.value_info) == ["b", "r"]
    assert names(after.graph.initializer) == ["c.weight", "k", "bn.folded_bias"]
    for part in (model, after):
        for field in ("node", "initializer", "value_info"):
            part.graph.ClearField(field)
    assert after == model


def test_a_fold_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    right = _onnx_pairs.scale_and_shift
    monkeypatch.setattr(_onnx_pairs, "scale_and_shift", lambda *given: right(*given[:4], 0.0))  # eps forgotten
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, given, (2, 3, 5, 5))
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert "folded into Conv c, the error would be" in changes.left_alone[0].reason
    assert changes.changes == changes.measurements == ()
    # And should every pair pass, the whole model does not.
    monkeypatch.setattr(_onnx_proof.Proof, "of_fold", lambda *given: 0.0)
    with pytest.raises(UsageError, match=r"m\.onnx: output 'y' must stay within 0.0001 when folded, got an error of"):
        fold_onnx(path)


def test_tolerance_is_what_counts(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, given, (2, 3, 5, 5))
    assert "above 1e-12" in fold_onnx(path, tolerance=1e-12).changes.left_alone[0].reason
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(UsageError, match="tolerance must be above 0 and finite"):
            fold_onnx(path, tolerance=wrong)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, TensorProto.FLOAT16), (np.float64, TensorProto.DOUBLE)])
def test_other_dtypes_are_rounded_once(tmp_path, dtype, kind):
    weight, values = normal(4, 3, 3, 3).astype(dtype), {k: v.astype(dtype) for k, v in parameters(4).items()}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    given = tensors({"c.weight": weight, **prefixed(values)}, dtype)
    model, changes = folded(saved(tmp_path, nodes, given, (2, 3, 5, 5), kind=kind))
    assert changes.left_alone == ()
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wide_values = {key: value.astype(np.float64) for key, value in values.items()}
    scale = wide_values["weight"] / np.sqrt(wide_values["running_var"] + np.float64(np.float32(EPS)))
    expected = (weight.astype(np.float64) * scale[:, None, None, None]).astype(dtype)
    shift = (wide_values["bias"] - wide_values["running_mean"] * scale).astype(dtype)
    assert found["c.weight"].dtype == found["bn.folded_bias"].dtype == dtype
    # One step where torch and numpy round the square root differently.
    assert np.allclose(found["c.weight"], expected, rtol=2 * np.finfo(dtype).eps, atol=0)
    assert np.allclose(found["bn.folded_bias"], shift, rtol=2 * np.finfo(dtype).eps, atol=1e-7)


def test_a_fold_that_overflows_half_precision_is_not_kept(tmp_path):
    values = {**parameters(4), "running_var": np.zeros(4), "running_mean": np.zeros(4)}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node(epsilon=1e-8)]
    given = tensors(
        {"c.weight": np.full((4, 3, 1, 1), 100.0), **prefixed({**values, "weight": np.ones(4)})}, np.float16
    )
    path = saved(tmp_path, nodes, given, (2, 3, 2, 2), kind=TensorProto.FLOAT16)
    result = fold_onnx(path, example=np.full((2, 3, 2, 2), 1e-4, dtype=np.float16))
    assert result.changes.left_alone[0].reason == "folded into Conv c, the values would not all be finite"


def test_an_example_for_unknown_dimensions(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, given, ("n", 3, "h", "w"))
    _, changes = folded(path)
    assert changes.notes == (
        "no random inputs: input 'x' has unknown dimensions. Give an example",
        "the whole model was not run: every fold was checked by itself, on made-up inputs",
    )
    assert [measured.layer for measured in changes.measurements] == ["bn"]
    for example in (normal(1, 3, 6, 6), {"x": normal(1, 3, 6, 6).astype(np.float32)}):
        _, changes = folded(path, example=example)
        assert changes.notes == ()
        assert [measured.layer for measured in changes.measurements] == ["bn", None]


def test_a_batch_that_is_not_as_free_as_it_says(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    shape = numpy_helper.from_array(np.array([1, 36], dtype=np.int64), "shape")
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    _, changes = folded(saved(tmp_path, nodes, [shape, *given], ("n", 3, 5, 5)))
    assert changes.notes == ()
    assert changes.measurements[-1].layer is None


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"z": np.zeros((2, 4, 3))}, "example must have the inputs 'x', got 'z'"),
        (np.zeros((2, 4)), r"example must hold 'x' with shape \(2, 4, 3\), got \(2, 4\)"),
        (np.zeros((2, 5, 3)), r"got \(2, 5, 3\)"),
        (np.zeros((2, 4, 3), dtype=np.int64), "example must hold 'x' as float32, got int64"),
    ],
)
def test_an_example_that_does_not_fit(tmp_path, example, message):
    path = saved(tmp_path, [bn_node("x")], tensors(prefixed(parameters(4))), (2, 4, 3))
    with pytest.raises(UsageError, match=message):
        fold_onnx(path, example=example)


def test_one_array_for_two_inputs(tmp_path):
    nodes = [helper.make_node("Add", ["x", "z"], ["h"]), bn_node()]
    path = saved(tmp_path, nodes, tensors(prefixed(parameters(4))), (2, 4, 3), inputs=[info("z", (2, 4, 3))])
    with pytest.raises(UsageError, match="must be a mapping with the inputs 'x', 'z', got one array"):
        fold_onnx(path, example=np.zeros((2, 4, 3)))


def test_an_operator_nobody_knows_is_said_and_pairs_are_checked_alone(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Secret", ["b"], ["y"], domain="mine"),
    ]
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    result = fold_onnx(saved(tmp_path, nodes, given, (2, 3, 5, 5)))
    assert kinds(onnx.load_from_string(result.content)) == ["Conv", "Secret"]
    first, second = result.changes.notes
    assert first.startswith("the reference evaluator of onnx does not run the model: ")
    assert "Secret" in first
    assert second == "the whole model was not run: every fold was checked by itself, on made-up inputs"
    assert result.changes.measurements[0].value < 1e-5


def test_made_up_inputs_catch_a_wrong_fold_too(tmp_path, monkeypatch):
    right = _onnx_pairs.scale_and_shift
    monkeypatch.setattr(_onnx_pairs, "scale_and_shift", lambda *given: right(*given[:4], 0.0))
    nodes = [
        helper.make_node("Gemm", ["x", "c.weight"], ["h"], transB=1),
        bn_node(result="b"),
        helper.make_node("Secret", ["b"], ["y"], domain="mine"),
    ]
    given = tensors({"c.weight": normal(4, 3), **prefixed(parameters(4))})
    changes = fold_onnx(saved(tmp_path, nodes, given, (2, 3))).changes
    assert "the error would be" in changes.left_alone[0].reason


def test_whole_numbers_are_compared_one_by_one(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("ArgMax", ["b"], ["y"], axis=1),
    ]
    given = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, given, (2, 3, 5, 5), outputs=(info("y", None, TensorProto.INT64),))
    assert fold_onnx(path).changes.measurements[-1].value == 0


def test_external_data_is_taken_into_the_model(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    path = saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), (2, 3, 5, 5))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model, _ = folded(path)
    (tmp_path / "w.bin").unlink()
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))
    with pytest.raises(DamagedFile, match=r"external data of 'c.weight' must be readable beside the model"):
        fold_onnx(path)


def test_external_data_too_large_for_one_file(tmp_path):
    path = saved(tmp_path, [bn_node("x")], tensors(prefixed(parameters(4))), (2, 4, 3))
    model = onnx.load(path)
    huge = model.graph.initializer.add(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 30])
    huge.data_location = TensorProto.EXTERNAL
    huge.external_data.add(key="location", value="w.bin")
    onnx.save(model, path)
    with pytest.raises(UsageError, match="model must be smaller than 2 GB with its external data, got more"):
        fold_onnx(path)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    with pytest.raises(UnreadableFile, match="no such file"):
        fold_onnx(path)
    path.write_bytes(b"\x08\x04\xff\xff\xff")
    with pytest.raises(DamagedFile, match=r"m\.onnx: file must be a whole ONNX model"):
        fold_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(NotACheckpoint, match="without a graph"):
        fold_onnx(path)
    saved(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [], (2, 4))
    with pytest.raises(NoBatchNorm, match=r"m\.onnx: model must hold a BatchNormalization node, got none"):
        fold_onnx(path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[onnx\]'"):
        fold_onnx(path)


def test_a_damaged_model_is_no_fault_of_ours_and_a_fault_of_ours_is_not_hidden(tmp_path, monkeypatch):
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"], group=2)
    given = tensors({"c.weight": normal(4, 2, 1, 1), **prefixed(parameters(4))})
    path = saved(tmp_path, [conv, bn_node()], given, (2, 4, 3, 3))
    whole = path.read_bytes()

    def damage(change):
        model = onnx.load_from_string(whole)
        change(model.graph)
        path.write_bytes(model.SerializeToString())

    damage(lambda graph: graph.node[0].attribute[0].__setattr__("type", onnx.AttributeProto.STRINGS))
    with pytest.raises(DamagedFile, match=r"m\.onnx: file must be a valid ONNX model, got a damaged one: "):
        fold_onnx(path)
    damage(lambda graph: graph.initializer[0].__setattr__("raw_data", b"1234"))
    with pytest.raises(DamagedFile, match=r"m\.onnx: tensor 'c.weight' must hold the values it promises"):
        fold_onnx(path)
    path.write_bytes(whole)
    monkeypatch.setattr(_onnx_pairs, "scale_and_shift", lambda *given: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        fold_onnx(path)


def test_layers_of_the_same_name_and_the_record_as_json(tmp_path):
    values = prefixed(parameters(4))
    nodes = [bn_node("x", "h"), helper.make_node("Relu", ["h"], ["r"]), bn_node("r")]
    _, changes = folded(saved(tmp_path, nodes, tensors(values), (2, 4, 3)))
    assert [change.layer for change in changes.changes] == ["bn", "bn#2"]
    assert Changes.from_json(changes.to_json()) == changes


def test_difference_is_relative_and_sees_what_is_not_finite():
    assert difference(np.array([1.0, -4.0]), np.array([1.0, -3.0])) == 0.25
    assert difference(np.array([np.inf, np.nan, 1]), np.array([np.inf, np.nan, 1])) == 0
    assert (
        difference(np.array([1.0]), np.array([np.inf])) == difference(np.array([np.inf]), np.array([1.0])) == math.inf
    )
    assert difference(np.zeros(2), np.zeros(3)) == math.inf
    assert difference(np.zeros(2), np.full(2, 0.5)) == 0.5


def test_the_evaluator_normalises_by_the_statistics_of_the_node_in_every_opset():
    x, values = normal(2, 4, 3).astype(np.float32), parameters(4)
    for opset in (7, 9, 14, 17):
        same(made([bn_node("x")], tensors(prefixed(values)), (2, 4, 3), opset=opset), x, batch_norm(x, values))
    trained = made([bn_node("x", training_mode=1)], tensors(prefixed(values)), (2, 4, 3))
    batch = {**values, "running_mean": x.mean((0, 2)), "running_var": x.var((0, 2))}
    same(trained, x, batch_norm(x, batch))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 1, 1, 1]},
        {"strides": [2, 1], "count_include_pad": 1, "pads": [1, 0, 0, 1]},
        {"ceil_mode": 1, "strides": [2, 2]},
    ],
)
def test_the_evaluator_averages_as_its_own_slow_operator_does(attributes):
    from onnx.reference import ReferenceEvaluator

    x = normal(2, 3, 7, 6).astype(np.float32)
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 2], **attributes)
    model = made([node], [], x.shape)
    same(model, x, ReferenceEvaluator(model).run(None, {"x": x})[0])


def test_the_evaluator_says_why_it_cannot_run():
    model = made([helper.make_node("Secret", ["x"], ["y"], domain="mine")], [], (2, 4))
    with pytest.raises(CannotRun, match="Secret"):
        run_model(model, {"x": np.zeros((2, 4), dtype=np.float32)})
