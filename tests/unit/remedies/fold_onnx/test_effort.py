import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import bn_node, info, made, normal, parameters, prefixed, saved, tensors  # noqa: E402

from bnlab.errors import DamagedFile, TooMuchWork  # noqa: E402
from bnlab.remedies.fold_onnx.effort import LIMITS, count_work, values_to_add, values_to_read  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]


def relu(source="x", result="y"):
    return helper.make_node("Relu", [source], [result])


def branch(body):
    return helper.make_node("If", ["c"], ["i"], then_branch=body)


def graph(*nodes):
    return helper.make_graph(nodes, "g", [], [info("y", None)])


def model(*nodes, functions=()):
    return helper.make_model(graph(*nodes), opset_imports=OPSETS, functions=functions)


def call(name, source="x", result="y"):
    return helper.make_node(name, [source], [result], domain="mine")


def function(name, *nodes):
    return helper.make_function("mine", name, ["x"], ["y"], nodes, OPSETS)


def doubled(levels):
    calls = [function(f"F{n}", call(f"F{n - 1}", "x", "h"), call(f"F{n - 1}", "h", "y")) for n in range(1, levels)]
    return model(call(f"F{levels - 1}"), functions=[function("F0", bn_node("x", "y")), *calls])


def chained(levels):
    calls = [function(f"F{n}", call(f"F{n - 1}")) for n in range(1, levels)]
    return model(call(f"F{levels - 1}"), functions=[function("F0", relu()), *calls])


def nested(depth):
    body = graph(relu())
    for _ in range(depth):
        body = graph(branch(body))
    return body


@pytest.mark.parametrize(
    ("made_model", "kind", "amount"),
    [
        (model(relu(), relu()), "nodes", 2),
        (model(bn_node(), relu(), bn_node()), "BN nodes", 2),
        (model(branch(nested(2))), "nodes", 1 + 2 + 3 + 4),
        (model(branch(nested(2))), "subgraphs and functions", 4),
        (model(call("F0"), call("F0"), functions=[function("F0", bn_node("x", "y"))]), "BN nodes", 1 + 2),
        (doubled(5), "BN nodes", 1 + 16),
        (chained(7), "calls inside calls", 7),
    ],
)
def test_amounts(made_model, kind, amount):
    count_work(made_model, {**LIMITS, kind: amount})
    with pytest.raises(TooMuchWork, match=f"at most {amount - 1} {kind} outside its tensors, got more. Fold the model"):
        count_work(made_model, {**LIMITS, kind: amount - 1})


@pytest.mark.parametrize("made_model", [doubled(60), chained(3_000)], ids=["doubled", "chained"])
def test_functions_that_ask_for_far_more_than_their_size(made_model):
    with pytest.raises(TooMuchWork):
        count_work(made_model)


def test_a_function_that_nothing_calls_does_not_count_as_called():
    count_work(model(relu(), functions=[function("F0", *[bn_node("x", "y")] * 3)]), {**LIMITS, "BN nodes": 3})


@pytest.mark.parametrize(
    "functions",
    [[function("F0", call("F0"))], [function("F0", call("F1")), function("F1", relu(), call("F0"))]],
    ids=["itself", "each other"],
)
def test_a_function_that_calls_itself_is_no_model(functions):
    with pytest.raises(DamagedFile, match="got a function 'F0' that calls itself"):
        count_work(model(call("F0"), functions=functions))


def test_the_error_names_the_file(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(doubled(60), path)
    with pytest.raises(TooMuchWork, match=r"m\.onnx: file must hold at most"):
        fold_onnx(path)


def test_layers_that_share_one_large_constant(tmp_path):
    """1,000 layers of 1M channels, whose values lie in a file of a few kilobytes."""
    shape = numpy_helper.from_array(np.array([1 << 20]), "s")
    parameters = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    nodes = [helper.make_node("ConstantOfShape", ["s"], [name]) for name in parameters]
    path = saved(tmp_path, [*nodes, *(bn_node("x", f"y{n}") for n in range(1_000))], [shape], (1, 1), outputs=["y0"])
    with pytest.raises(TooMuchWork, match=r"m\.onnx: file must hold BN parameters of a size that networks have"):
        fold_onnx(path)


def test_an_honest_model_may_read_its_weights_many_times():
    weights = made([relu()], tensors({"w": normal(64, 64)}), (2, 3))
    assert values_to_add(weights).left >= 16 * 64 * 64
    large = made([relu()], tensors({"w": normal(2048, 2048)}), (2, 3))
    assert values_to_add(large).left >= 16 * 2048 * 2048
    assert values_to_read(large).left >= values_to_add(large).left


def test_a_model_with_the_weights_of_a_resnet50_in_a_few_bytes_is_folded(tmp_path):
    """The light models of ONNX describe their weights by ConstantOfShape: 23.5 million values, read three times."""
    shape = numpy_helper.from_array(np.array([1024, 1024, 3, 3]), "s")
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["w"]),
        *(helper.make_node("Conv", ["x" if n == 0 else f"b{n - 1}", "w"], [f"a{n}"], pads=[1] * 4) for n in range(3)),
        *(bn_node(f"a{n}", f"b{n}") for n in range(3)),
    ]
    order = [nodes[0], *(node for pair in zip(nodes[1:4], nodes[4:], strict=True) for node in pair)]
    constants = [shape, *tensors(prefixed(parameters(1024)))]
    folded = fold_onnx(saved(tmp_path, order, constants, (1, 1024, 2, 2), outputs=["b2"]))
    assert len(folded.changes.changes) == 3
