import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    RANDOM,
    batch_norm,
    bn_node,
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

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 3)])
def test_a_bn_and_the_constants_behind_it_become_mul_and_add(tmp_path, shape):
    x, values, trailing = normal(*shape), parameters(4), [1] * (len(shape) - 2)
    factor, offset = RANDOM.uniform(1, 2, (4, *trailing)), normal(4, *trailing)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Mul", ["b", "f"], ["m"]),
        helper.make_node("Add", ["o", "m"], ["y"]),
    ]
    constants = tensors({"f": factor, "o": offset, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, constants, shape))
    assert kinds(model) == ["Relu", "Mul", "Add"]
    assert len(model.graph.initializer) == 2
    assert changes.changes[0].after == "merged with its neighbours into Mul and Add"
    expected = batch_norm(np.maximum(wide(x).numpy(), 0), values) * wide(factor).numpy() + wide(offset).numpy()
    same(model, x, expected)


def test_constants_before_it_too(tmp_path):
    x, values, offset = normal(2, 4, 3), parameters(4), normal(4, 1)
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Sub", ["o", "r"], ["s"]),
        helper.make_node("Identity", ["s"], ["h"]),
        bn_node(),
    ]
    model, _ = folded(saved(tmp_path, nodes, tensors({"o": offset, **prefixed(values)}), x.shape))
    assert kinds(model) == ["Relu", "Mul", "Add"]
    same(model, x, batch_norm(wide(offset).numpy() - np.maximum(wide(x).numpy(), 0), values))


def test_without_a_constant_it_stays(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["h"]), bn_node()]
    model, changes = folded(saved(tmp_path, nodes, tensors(prefixed(parameters(4))), (2, 4, 3)))
    assert model == onnx.load(tmp_path / "m.onnx")
    assert changes.left_alone[0].reason.endswith("; a Mul and an Add in its place would be one node more")


def test_a_fold_into_a_conv_that_becomes_possible_later_comes_first(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node("h", "b"),
        helper.make_node("Mul", ["b", "f"], ["m"]),
        bn_node("m", "i", "i."),
        helper.make_node("Conv", ["i", "c.weight"], ["y"]),
    ]
    constants = {"f": normal(4, 1), "c.weight": normal(4, 4, 1)}
    constants |= {**prefixed(parameters(4)), **prefixed(parameters(4), "i.")}
    model, _ = folded(saved(tmp_path, nodes, tensors(constants), (2, 4, 3)))
    assert kinds(model) == ["Relu", "Conv"]
