import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
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


def test_a_bn_that_can_be_folded_nowhere_has_the_reasons_of_both_sides(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["h"]), bn_node("h", "b"), helper.make_node("Relu", ["b"], ["y"])]
    _, changes = folded(saved(tmp_path, nodes, tensors(prefixed(parameters(4))), (2, 4, 3)))
    assert changes.left_alone[0].reason.startswith("Relu feeds it; Relu is behind it; a Mul and an Add")


def test_the_node_before_comes_first(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["h"]),
        bn_node("h", "b"),
        helper.make_node("Conv", ["b", "c.weight"], ["y"]),
    ]
    initializers = tensors({"a.weight": normal(4, 4, 1), "c.weight": normal(4, 4, 1), **prefixed(parameters(4))})
    _, changes = folded(saved(tmp_path, nodes, initializers, (2, 4, 3)))
    assert changes.changes[0].after == "folded into Conv a"


def test_a_fold_makes_room_for_the_next_one(tmp_path):
    x, weight, first, second = normal(2, 4, 5), normal(4, 4, 1), parameters(4), parameters(4)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node("h", "i", "a."),
        bn_node("i", "j", "b."),
        helper.make_node("Conv", ["j", "c.weight"], ["y"]),
    ]
    initializers = tensors({"c.weight": weight, **prefixed(first, "a."), **prefixed(second, "b.")})
    model, changes = folded(saved(tmp_path, nodes, initializers, x.shape))
    assert kinds(model) == ["Relu", "Conv"]
    assert {change.layer for change in changes.changes} == {"a", "b"}
    hidden = batch_norm(batch_norm(np.maximum(wide(x).numpy(), 0), first), second)
    same(model, x, conv1d(torch.from_numpy(hidden), wide(weight)).numpy())
