import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, pad

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

PADS_A_VALID_CONV = tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 18)
VALID = pytest.param(
    {"auto_pad": "VALID"},
    marks=pytest.mark.skipif(PADS_A_VALID_CONV, reason="the evaluator of onnx 1.17 pads a Conv that is VALID"),
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
    initializers = tensors({"c.weight": weight, "c.bias": bias, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 4, 5, 5)))
    assert kinds(model) == ["Relu", "Conv"]
    assert changes.changes[0].after == "folded into Conv c behind it"
    normalised = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), values))
    same(model, x, conv2d(normalised, wide(weight), wide(bias), groups=groups).numpy())
    unshifted = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), {**values, "bias": np.zeros(4)}))
    with pytest.raises(AssertionError):  # the shift forgotten
        same(model, x, conv2d(unshifted, wide(weight), wide(bias), groups=groups).numpy())


@pytest.mark.parametrize("is_transposed", [0, 1])
def test_a_bn_goes_into_the_gemm_behind_it(tmp_path, is_transposed):
    x, weight, bias, values = normal(2, 5), normal(5, 4), normal(4), parameters(5)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Gemm", ["b", "c.weight", "c.bias"], ["y"], alpha=2.0, beta=0.5, transB=is_transposed),
    ]
    initializers = tensors({"c.weight": weight.T if is_transposed else weight, "c.bias": bias, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, initializers, (2, 5)))
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
    initializers = tensors({"c.weight": weight, **prefixed(values)})
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 4, 5, 5)))
    assert model == onnx.load(tmp_path / "m.onnx")
    normalised = torch.from_numpy(batch_norm(np.maximum(wide(x).numpy(), 0), values))
    ends = padding.get("pads", [1, 1, 1, 1])
    padded = pad(normalised, (ends[1], ends[3], ends[0], ends[2]))
    same(model, x, conv2d(padded, wide(weight)).numpy())
    assert "the Conv behind it pads with zeros" in changes.left_alone[0].reason


@pytest.mark.parametrize("is_left", [False, True])
def test_a_bn_goes_into_the_matrix_product_behind_it(tmp_path, is_left):
    x, values = normal(2, 4, 5), parameters(4)
    weight = normal(3, 4) if is_left else normal(4, 3)
    behind = [helper.make_node("MatMul", ["c.weight", "b"], ["y"])]
    if not is_left:
        behind = [
            helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["t", "c.weight"], ["y"]),
        ]
    path = saved(tmp_path, [bn_node("x", "b"), *behind], tensors({"c.weight": weight, **prefixed(values)}), x.shape)
    model, changes = folded(path)
    assert kinds(model) == [*(["MatMul"] if is_left else ["Transpose", "MatMul"]), "Add"]
    assert changes.changes[0].after == "folded into MatMul c behind it, with an Add behind it"
    normalised = batch_norm(x.astype(np.float32), values)
    right = wide(weight).numpy()
    same(model, x, right @ normalised if is_left else normalised.transpose(0, 2, 1) @ right)


def test_a_matrix_product_of_rank_2_becomes_a_gemm(tmp_path):
    x, weight, values = normal(5, 4), normal(4, 3), parameters(4)
    nodes = [bn_node("x", "b"), helper.make_node("MatMul", ["b", "c.weight"], ["y"])]
    model, _ = folded(saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), x.shape))
    assert kinds(model) == ["Gemm"]
    same(model, x, batch_norm(x.astype(np.float32), values) @ wide(weight).numpy())


def test_a_matrix_product_over_positions_is_no_place_for_it(tmp_path):
    nodes = [bn_node("x", "b"), helper.make_node("MatMul", ["b", "c.weight"], ["y"])]
    path = saved(tmp_path, nodes, tensors({"c.weight": normal(4, 4), **prefixed(parameters(4))}), (2, 4, 4))
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert "the MatMul behind it does not sum over its channels" in changes.left_alone[0].reason


def test_padding_is_fine_for_a_bn_that_maps_zero_to_zero(tmp_path):
    x, weight = normal(2, 4, 5, 5), normal(6, 4, 3, 3)
    values = {**parameters(4), "bias": np.zeros(4), "running_mean": np.zeros(4)}
    nodes = [bn_node("x", "b"), helper.make_node("Conv", ["b", "c.weight"], ["y"], pads=[1, 1, 1, 1])]
    model, _ = folded(saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), x.shape))
    assert kinds(model) == ["Conv"]
    normalised = torch.from_numpy(batch_norm(wide(x).numpy(), values))
    same(model, x, conv2d(normalised, wide(weight), padding=1).numpy())


def test_constants_behind_the_bn_are_folded_too(tmp_path):
    x, weight, values = normal(2, 4, 5, 5), normal(6, 4, 3, 3), parameters(4)
    factor, offset = RANDOM.uniform(1, 2, (4, 1, 1)), normal(1, 4, 1, 1)
    nodes = [
        bn_node("x", "b"),
        helper.make_node("Mul", ["b", "f"], ["m"]),
        helper.make_node("Sub", ["o", "m"], ["s"]),
        helper.make_node("Conv", ["s", "c.weight"], ["y"]),
    ]
    initializers = tensors({"c.weight": weight, "f": factor, "o": offset, **prefixed(values)})
    model, _ = folded(saved(tmp_path, nodes, initializers, x.shape))
    assert kinds(model) == ["Conv"]
    hidden = wide(offset).numpy() - wide(factor).numpy() * batch_norm(wide(x).numpy(), values)
    same(model, x, conv2d(torch.from_numpy(hidden), wide(weight)).numpy())
