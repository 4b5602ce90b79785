import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import bn_node, folded, info, normal, parameters, prefixed, saved, tensors  # noqa: E402

from bnlab.errors import UsageError  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402


def test_an_example_for_unknown_dimensions(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, initializers, ("n", 3, "h", "w"))
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
