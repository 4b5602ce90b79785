import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    KEYS,
    batch_norm,
    bn_node,
    folded,
    kinds,
    names,
    normal,
    parameters,
    prefixed,
    saved,
    tensors,
)

from bnlab.remedies.fold_onnx.linear_node import rounded  # noqa: E402
from bnlab.remedies.fold_onnx.taps import convolve  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def test_bfloat16_weights_are_rounded_once(tmp_path):
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    weight, values = normal(4, 3, 3).astype(dtype), {key: value.astype(dtype) for key, value in parameters(4).items()}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    constants = tensors({"c.weight": weight, **prefixed(values)}, dtype)
    path = saved(tmp_path, nodes, constants, (2, 3, 5), kind=TensorProto.BFLOAT16, opset=22)
    model, changes = folded(path)
    assert kinds(model) == ["Conv"]
    assert changes.notes[-1] == "proven with the reference evaluator of onnx"
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored["c.weight"].dtype == stored["bn.folded_bias"].dtype == dtype
    x = normal(2, 3, 5)
    after = convolve(x, stored["c.weight"].astype(float), stored["bn.folded_bias"].astype(float))
    expected = batch_norm(convolve(x, weight.astype(float)), {key: values[key].astype(float) for key in KEYS})
    assert np.abs(after - expected).max() < 2e-2 * np.abs(expected).max()


def test_an_overflow_is_inf_without_a_warning():
    assert np.isinf(rounded(np.array([1e300]), np.dtype(np.float32))).all()


def test_a_quantized_weight_is_kept(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["c.weight"]),
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(),
    ]
    integers = numpy_helper.from_array(np.ones((4, 3, 3), dtype=np.int8), "q")
    initializers = [integers, *tensors({"s": np.asarray(0.1), **prefixed(parameters(4))})]
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 3, 5)))
    assert model == onnx.load(tmp_path / "m.onnx")
    assert "the weight of the Conv is quantized" in changes.left_alone[0].reason


def test_a_weight_stored_in_another_shape_or_dtype(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Cast", ["t"], ["fc.weight"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"]),
        bn_node(),
    ]
    initializers = [*tensors({"w": normal(4, 6)}, np.float16), *tensors(prefixed(parameters(4)))]
    model, _ = folded(saved(tmp_path, nodes, initializers, (5, 6)))
    assert kinds(model) == ["Gemm"]
    assert names(model.graph.initializer) == ["bn.folded_weight", "bn.folded_bias"]


def test_groups_that_do_not_fit_are_refused(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"], group=3), bn_node()]
    path = tmp_path / "m.onnx"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 6, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors({"c.weight": normal(4, 2, 3), **prefixed(parameters(4))}),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    _, changes = folded(path)
    assert "the Conv has 3 groups for a weight of shape (4, 2, 3)" in changes.left_alone[0].reason


def test_a_bias_that_grows_gets_a_name_of_its_own(tmp_path):
    gemm = helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["h"])
    constants = tensors({"fc.weight": normal(6, 4), "fc.bias": normal(1), **prefixed(parameters(4))})
    listed = [helper.make_tensor_value_info(c.name, c.data_type, list(c.dims)) for c in constants]
    path = saved(tmp_path, [gemm, bn_node()], constants, (5, 6), opset=8, ir=3, inputs=listed)
    model, _ = folded(path)
    assert names(model.graph.initializer) == names(model.graph.input)[1:] == ["fc.weight", "bn.folded_bias"]
