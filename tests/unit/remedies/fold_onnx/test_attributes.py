import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

from bnlab.remedies.fold_onnx.attributes import attribute, is_foldable, refuse_linked  # noqa: E402
from bnlab.remedies.refusal import Refusal  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def test_an_attribute_has_a_default():
    node = helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5)
    assert attribute(node, "alpha", 1.0) == 0.5
    assert attribute(node, "beta", 1.0) == 1.0


def test_an_attribute_of_a_call_is_refused():
    node = helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5)
    refuse_linked(node)
    node.attribute[0].ref_attr_name = "scale"
    with pytest.raises(Refusal, match="Gemm takes an attribute from the call of the function"):
        refuse_linked(node)


def test_floating_dtypes_can_be_folded():
    kinds = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
    assert all(is_foldable(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) for kind in kinds)
    others = (TensorProto.FLOAT8E4M3FN, TensorProto.INT8, TensorProto.COMPLEX64)
    assert not any(is_foldable(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) for kind in others)
