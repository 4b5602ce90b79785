import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import made, normal, tensors  # noqa: E402

from bnlab.remedies.fold_onnx.cost import cost_of, typed  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def chain(shape=("n", 3, 8, 8)):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    return made(nodes, tensors({"w": normal(16, 3, 3, 3), "v": normal(2, 16, 1, 1)}), shape)


def test_memory_is_that_of_tensors_that_live_at_the_same_time():
    pixels = 5 * 8 * 8 * 4  # float32, 5 samples
    cost = cost_of(chain(), {"x": (5, 3, 8, 8)}, ())
    assert cost.memory == 2 * 16 * pixels  # a and b, and neither x nor c
    assert cost.kept == 5 * 2 * 4
    kept = cost_of(chain(), {"x": (5, 3, 8, 8)}, {"a"})
    assert kept.memory == cost.memory + 2 * pixels  # a, b and c
    assert kept.kept == cost.kept + 16 * pixels


def test_products_are_counted():
    nodes = [
        helper.make_node("ConvTranspose", ["x", "t"], ["a"]),
        helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["h"]),
        helper.make_node("MatMul", ["h", "m"], ["y"]),
    ]
    weights = tensors({"t": normal(3, 4, 2, 2), "g": normal(4 * 9 * 9, 5), "m": normal(5, 6)})
    cost = cost_of(made(nodes, weights, ("n", 3, 8, 8)), {"x": (2, 3, 8, 8)}, ())
    assert cost.products == 2 * 3 * 64 * 4 * 4 + 2 * 4 * 81 * 5 + 2 * 5 * 6
    conv = cost_of(chain(), {"x": (5, 3, 8, 8)}, ())
    assert conv.products == 5 * 64 * (16 * 27 + 2 * 16)


def test_large_weights_are_not_copied_and_keep_their_types():
    model = made([helper.make_node("MatMul", ["x", "w"], ["y"])], tensors({"w": normal(300, 200)}), ("n", 300))
    light = typed(model)
    assert not light.graph.initializer
    assert {value.name for value in light.graph.input} == {"x", "w"}
    (output,) = light.graph.output
    assert [side.dim_value for side in output.type.tensor_type.shape.dim] == [0, 200]
    assert len(model.graph.initializer) == 1


def test_an_unknown_operator_costs_nothing():
    model = made([helper.make_node("Secret", ["x"], ["y"], domain="mine")], [], (2, 3))
    assert cost_of(model, {"x": (2, 3)}, ()).memory == 24
