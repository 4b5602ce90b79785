import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import bn_node, folded, info, normal, parameters, prefixed, saved, tensors  # noqa: E402

from bnlab.errors import UsageError  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def fully_convolutional(tmp_path, nodes=()):
    first = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node(result="b" if nodes else "y"), *nodes]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    return saved(tmp_path, first, initializers, ("n", 3, "h", "w"))


def test_sizes_that_the_file_does_not_state_are_tried(tmp_path):
    path = fully_convolutional(tmp_path)
    _, changes = folded(path)
    assert changes.notes[0] == "the file does not state every size of its inputs, run on x 2x3x64x64"
    assert [measured.layer for measured in changes.measurements] == ["bn", None]
    for example in (normal(1, 3, 6, 6), {"x": normal(1, 3, 6, 6).astype(np.float32)}):
        _, changes = folded(path, example=example)
        assert [note.split()[0] for note in changes.notes] == ["proven"]


def test_sizes_that_fit_no_guess(tmp_path):
    shape = numpy_helper.from_array(np.array([-1, 4 * 8 * 8], dtype=np.int64), "s")
    nodes = [
        helper.make_node("Constant", [], ["s"], value=shape),
        helper.make_node("Reshape", ["b", "s"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["y"]),
        helper.make_node("Constant", [], ["m"], value=numpy_helper.from_array(np.ones((7, 1), dtype=np.float32), "m")),
    ]
    _, changes = folded(fully_convolutional(tmp_path, [nodes[0], nodes[3], nodes[1], nodes[2]]))
    assert any("the whole model was not run" in note for note in changes.notes)
    assert [measured.layer for measured in changes.measurements] == ["bn"]


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
