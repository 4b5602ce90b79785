import math

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import batch_norm, bn_node, made, normal, parameters, prefixed, same, tensors  # noqa: E402

from bnlab.remedies.fold_onnx.run import EvaluationError, difference, run_model  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


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
    with pytest.raises(EvaluationError, match="Secret"):
        run_model(model, {"x": np.zeros((2, 4), dtype=np.float32)})
