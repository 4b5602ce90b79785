"""Every real ONNX model, where it is present: BN folded away, and compared with outputs that bnlab did not compute."""

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import numpy_helper  # noqa: E402

from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402
from bnlab.remedies.fold_onnx.run import difference, run_model  # noqa: E402

ULTRAFACE = "nets/ultraface/version-RFB-320.onnx"
RAW_BOXES = "460"
"""In the file with BN, what it decodes its boxes from: the output "boxes" of the file its authors folded."""

LIGHT = {
    # model: how many BN are folded into a Conv, and how many with constants behind them into Mul and Add
    "light_resnet50": (53, 0),
    "light_inception_v2": (69, 0),
    "light_shufflenet": (49, 0),
    # Pre-activation: 62 follow a pooling or a concatenation, and a Mul and an Add of constants follow them.
    "light_densenet121": (59, 62),
}
CONVERTED = ("BatchNorm1d_3d_input", "BatchNorm2d", "BatchNorm2d_momentum", "BatchNorm3d", "BatchNorm3d_momentum")


def folded(path):
    before = path.read_bytes()
    result = fold_onnx(path)
    assert path.read_bytes() == before
    model = onnx.load_from_string(result.content)
    onnx.checker.check_model(model, full_check=True)
    return model, result.changes


def count(model):
    return Counter(node.op_type for node in model.graph.node)


def proto(path):
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def test_ultraface_is_what_its_authors_folded(data):
    model, changes = folded(data / ULTRAFACE)
    published = onnx.load(data / ULTRAFACE.replace(".onnx", "_simplified.onnx"))
    assert [change.after.split()[:3] for change in changes.changes] == [["folded", "into", "Conv"]] * 35
    assert changes.left_alone == ()
    assert count(model) == count(onnx.load(data / ULTRAFACE)) - Counter(BatchNormalization=35)
    assert max(measured.value for measured in changes.measurements) < 1e-5
    image = np.random.default_rng(3).uniform(-1, 1, (1, 3, 240, 320)).astype(np.float32)
    outputs, expected = run_model(model, {"input": image}), run_model(published, {"input": image})
    assert np.abs(outputs["scores"] - expected["scores"]).max() < 1e-4
    assert np.abs(outputs[RAW_BOXES] - expected["boxes"]).max() < 1e-4
    # Decoded boxes are something else: the comparison can fail.
    assert np.abs(outputs["boxes"] - expected["boxes"]).max() > 0.1


def test_ultraface_has_the_weights_its_authors_folded(data):
    model, _ = folded(data / ULTRAFACE)
    published = onnx.load(data / ULTRAFACE.replace(".onnx", "_simplified.onnx"))
    pairs = [
        [[tensors[name] for name in node.input[1:]] for node in network.graph.node if node.op_type == "Conv"]
        for network in (model, published)
        for tensors in [{tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}]
    ]
    errors = [
        difference(their, our)
        for conv, other in zip(*pairs, strict=True)
        for our, their in zip(conv, other, strict=True)
    ]
    assert len(errors) == 104
    assert max(errors) < 1e-5


@pytest.mark.parametrize("name", LIGHT)
def test_light_models(data, name):
    path = data / f"onnx_bn/light/{name}.onnx"
    model, changes = folded(path)
    outcomes = Counter(change.after.split()[0] for change in changes.changes)
    assert (outcomes["folded"], outcomes["merged"]) == LIGHT[name]
    assert changes.left_alone == ()
    before, after = count(onnx.load(path)), count(model)
    assert after["BatchNormalization"] == 0
    assert after["Conv"] == before["Conv"]
    assert after.total() <= before.total()
    # Their outputs are constants, for so are most of their weights; the tensors inside are not.
    inside = [measured.value for measured in changes.measurements if measured.layer]
    assert len(inside) == sum(LIGHT[name])
    assert max(inside) < 1e-4


@pytest.mark.parametrize("name", CONVERTED)
def test_a_lone_bn_of_opset_6_is_left_alone_with_the_reason(data, name):
    folder = data / f"onnx_bn/pytorch-converted/test_{name}_eval"
    model, changes = folded(folder / "model.onnx")
    assert model == onnx.load(folder / "model.onnx")
    assert "Mul and Add do not broadcast in opset 6" in changes.left_alone[0].reason


@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_bn_of_opset_9_gives_the_output_onnx_says(data, name, tmp_path):
    folder = data / f"onnx_bn/pytorch-converted/test_{name}_eval"
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 9
    del model.graph.node[0].attribute[[a.name for a in model.graph.node[0].attribute].index("is_test")]
    onnx.save(model, tmp_path / "m.onnx")
    model, _ = folded(tmp_path / "m.onnx")
    assert count(model) == Counter(BatchNormalization=1)
    # In these old files the constants are inputs too, behind the real one.
    outputs = run_model(model, {model.graph.input[0].name: proto(folder / "test_data_set_0/input_0.pb")})
    expected = proto(folder / "test_data_set_0/output_0.pb")
    assert difference(expected, outputs[model.graph.output[0].name]) < 1e-5
