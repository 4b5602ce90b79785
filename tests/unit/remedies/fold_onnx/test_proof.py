import tracemalloc

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    bn_node,
    folded,
    info,
    kinds,
    normal,
    parameters,
    prefixed,
    saved,
    tensors,
)

from bnlab.errors import UsageError  # noqa: E402
from bnlab.remedies.fold_onnx import batch_norm_node as _batch_norm_node  # noqa: E402
from bnlab.remedies.fold_onnx import proof as _onnx_proof  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def test_a_fold_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    right = _batch_norm_node.scale_and_shift
    monkeypatch.setattr(
        _batch_norm_node, "scale_and_shift", lambda *arguments: right(*arguments[:4], 0.0)
    )  # eps forgotten
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, initializers, (2, 3, 5, 5))
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert "folded into Conv c, the error would be" in changes.left_alone[0].reason
    assert changes.changes == changes.measurements == ()
    # And should every pair pass, the whole model does not.
    monkeypatch.setattr(_onnx_proof.Proof, "of_fold", lambda *_: 0.0)
    with pytest.raises(UsageError, match=r"m\.onnx: output 'y' must stay within 0.0001 when folded, got an error of"):
        fold_onnx(path)


def test_a_fold_that_overflows_half_precision_is_not_kept(tmp_path):
    values = {**parameters(4), "running_var": np.zeros(4), "running_mean": np.zeros(4)}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node(epsilon=1e-8)]
    initializers = tensors(
        {"c.weight": np.full((4, 3, 1, 1), 100.0), **prefixed({**values, "weight": np.ones(4)})}, np.float16
    )
    path = saved(tmp_path, nodes, initializers, (2, 3, 2, 2), kind=TensorProto.FLOAT16)
    result = fold_onnx(path, example=np.full((2, 3, 2, 2), 1e-4, dtype=np.float16))
    assert result.changes.left_alone[0].reason == "if it were folded into Conv c, some values would not be finite"


def test_a_batch_that_is_not_as_free_as_it_says(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    shape = numpy_helper.from_array(np.array([1, 36], dtype=np.int64), "shape")
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    _, changes = folded(saved(tmp_path, nodes, [shape, *initializers], ("n", 3, 5, 5)))
    assert [note.split()[:2] for note in changes.notes] == [["proven", "with"]]
    assert changes.measurements[-1].layer is None


def test_an_unknown_operator_is_noted_and_pairs_are_checked_alone(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Secret", ["b"], ["y"], domain="mine"),
    ]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    result = fold_onnx(saved(tmp_path, nodes, initializers, (2, 3, 5, 5)))
    assert kinds(onnx.load_from_string(result.content)) == ["Conv", "Secret"]
    *others, last, whole, _ = result.changes.notes
    assert last.startswith("the reference evaluator of onnx does not run the model: ")
    assert all("Secret" in note for note in (*others, last))
    assert whole == "the whole model was not run: every fold was checked by itself, on made-up inputs"
    assert result.changes.measurements[0].value < 1e-5


def test_a_kernel_of_16_dimensions_is_not_run_on_made_up_inputs(tmp_path):
    weight = {"c.weight": np.ones((3, 1, *[1] * 14)), **prefixed(parameters(3))}
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("Unknown", ["b"], ["y"], domain="mine"),
    ]
    changes = fold_onnx(saved(tmp_path, nodes, tensors(weight), (1, 1, *[1] * 14))).changes
    (layer,) = changes.left_alone
    assert "the error could not be measured: the smallest input has 5.4e+08 values" in layer.reason


def test_made_up_inputs_catch_a_wrong_fold_too(tmp_path, monkeypatch):
    right = _batch_norm_node.scale_and_shift
    monkeypatch.setattr(_batch_norm_node, "scale_and_shift", lambda *arguments: right(*arguments[:4], 0.0))
    nodes = [
        helper.make_node("Gemm", ["x", "c.weight"], ["h"], transB=1),
        bn_node(result="b"),
        helper.make_node("Secret", ["b"], ["y"], domain="mine"),
    ]
    initializers = tensors({"c.weight": normal(4, 3), **prefixed(parameters(4))})
    changes = fold_onnx(saved(tmp_path, nodes, initializers, (2, 3))).changes
    assert "the error would be" in changes.left_alone[0].reason


def test_whole_numbers_are_compared_one_by_one(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("ArgMax", ["b"], ["y"], axis=1),
    ]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, initializers, (2, 3, 5, 5), outputs=(info("y", None, TensorProto.INT64),))
    assert fold_onnx(path).changes.measurements[-1].value == 0


@pytest.mark.parametrize("has_onnxruntime", [True, False])
@pytest.mark.parametrize(
    ("kind", "attributes", "shape"),
    [
        ("Conv", {}, (1, 4, 1 << 20, 1 << 20)),
        ("Conv", {"pads": [1 << 20] * 4}, (1, 4, 8, 8)),
        ("Conv", {"dilations": [1 << 28] * 2, "pads": [1 << 28] * 4}, (1, 4, 8, 8)),
        ("ConvTranspose", {"output_shape": [1 << 20] * 2}, (1, 4, 8, 8)),
    ],
)
def test_sizes_that_fill_no_memory(tmp_path, monkeypatch, kind, attributes, shape, has_onnxruntime):
    if not has_onnxruntime:
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    nodes = [helper.make_node(kind, ["x", "c.weight"], ["h"], **attributes), bn_node()]
    initializers = tensors({"c.weight": normal(4, 4, 3, 3), **prefixed(parameters(4))})
    tracemalloc.start()
    changes = fold_onnx(saved(tmp_path, nodes, initializers, shape)).changes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert [change.after for change in changes.changes] == [f"folded into {kind} c"]
    is_run = "dilations" in attributes
    assert any("the tensors inside take" in note for note in changes.notes) != is_run
    assert any("the whole model was not run" in note for note in changes.notes) != is_run
