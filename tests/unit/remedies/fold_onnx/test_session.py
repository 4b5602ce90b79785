import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    bn_node,
    folded,
    info,
    made,
    normal,
    parameters,
    prefixed,
    saved,
    tensors,
)

from bnlab.remedies.fold_onnx.run import EvaluationError, ReferenceRuntime  # noqa: E402
from bnlab.remedies.fold_onnx.session import OnnxRuntime, runtimes  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def chain():
    return made([helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])], [], (2, 3))


def test_tensors_inside_are_returned_on_request_and_the_model_stays():
    model = chain()
    before = model.SerializeToString()
    x = normal(2, 3).astype(np.float32)
    for runtime in (OnnxRuntime(onnxruntime), ReferenceRuntime()):
        results = runtime.run(model, {"x": x}, {"h", "x", "nothing"}, 60)
        assert set(results) == {"x", "h", "y"}
        assert np.array_equal(results["h"], -x)
        assert set(runtime.run(model, {"x": x}, (), 60)) == {"y"}
    assert model.SerializeToString() == before


def endless():
    """A loop of 1e12 steps, which takes days."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["s"], ["t"])],
        "body",
        [info("i", (), onnx.TensorProto.INT64), info("c", (), onnx.TensorProto.BOOL), info("s", (2, 3))],
        [info("d", (), onnx.TensorProto.BOOL), info("t", (2, 3))],
    )
    steps = [numpy_helper.from_array(np.array(10**12), "n"), numpy_helper.from_array(np.array(True), "go")]
    return made([helper.make_node("Loop", ["n", "go", "x"], ["y"], body=body)], steps, (2, 3))


def test_a_run_ends_at_its_limit(capfd):
    for runtime in (OnnxRuntime(onnxruntime), ReferenceRuntime()):
        with pytest.raises(EvaluationError):
            runtime.run(endless(), {"x": normal(2, 3).astype(np.float32)}, (), 0.5)
    assert capfd.readouterr().err == ""


def test_what_cannot_run_has_one_line(capfd):
    model = made([helper.make_node("Secret", ["x"], ["y"], domain="mine")], [], (2, 4))
    with pytest.raises(EvaluationError, match="Secret") as caught:
        OnnxRuntime(onnxruntime).run(model, {"x": np.zeros((2, 4), dtype=np.float32)}, (), 60)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_name_that_is_no_text_prints_nothing(capfd):
    model = made([helper.make_node("yyy", ["x"], ["y"], domain="mine")], [], (2, 4))
    model = onnx.ModelProto.FromString(model.SerializeToString().replace(b"yyy", b"\xffyy"))
    with pytest.raises(EvaluationError) as caught:
        OnnxRuntime(onnxruntime).run(model, {"x": np.zeros((2, 4), dtype=np.float32)}, (), 60)
    assert str(caught.value) == f"onnxruntime {onnxruntime.__version__} states a reason that is not UTF-8"
    assert capfd.readouterr() == ("", "")


NOT_TEXT = b"[ONNXRuntimeError] : 1 : FAIL : Fatal error: mine:\xffyy(-1) is not a registered function/op"


class Fail(Exception):
    """Stands for the class of this name in onnxruntime."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Fail(), "onnxruntime 1 states a reason that is not UTF-8"),  # Python 3.11.2
        (UnicodeDecodeError("utf-8", NOT_TEXT, 50, 51, "invalid start byte"), "onnxruntime 1 states a reason that is"),
        (Fail("a\nreason."), "a reason"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_the_reason_is_one_line_in_each_version_of_python(error, message):
    class Package:
        __version__ = "1"

        def __getattr__(self, name):
            raise error

    with pytest.raises(EvaluationError) as caught:
        OnnxRuntime(Package()).run(chain(), {}, (), 60)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_record_names_what_ran(tmp_path, monkeypatch):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": normal(4, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, initializers, (2, 3, 5))
    assert [runtime.name for runtime in runtimes()][1:] == ["the reference evaluator of onnx"]
    assert folded(path)[1].notes == (f"proven with onnxruntime {onnxruntime.__version__}",)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert folded(path)[1].notes == ("proven with the reference evaluator of onnx",)
