import math

import numpy as np
import pytest
from torch.nn.functional import conv2d

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import (  # noqa: E402
    EPS,
    batch_norm,
    bn_node,
    folded,
    info,
    kinds,
    made,
    names,
    normal,
    parameters,
    prefixed,
    same,
    saved,
    tensors,
    wide,
)

from bnlab.errors import DamagedFile, MissingPackage, NotACheckpoint, UnreadableFile, UsageError  # noqa: E402
from bnlab.records import Changes  # noqa: E402
from bnlab.remedies.fold_onnx import batch_norm_node as _batch_norm_node  # noqa: E402
from bnlab.remedies.fold_onnx.fold_onnx import fold_onnx  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


@pytest.mark.parametrize("opset", [6, 7, 9, 13, 14, 17, 22])
def test_every_opset(tmp_path, opset):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    mode = {"is_test": 1} if opset < 7 else {}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node(**mode)]
    path = saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), x.shape, opset=opset)
    model, changes = folded(path)
    assert kinds(model) == ["Conv"]
    assert changes.measurements[-1].value < 1e-5
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))


def test_the_rest_of_the_model_is_kept_byte_by_byte(tmp_path):
    weight, values = normal(4, 3, 3, 3), parameters(4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node(result="b"),
        helper.make_node("LeakyRelu", ["b"], ["r"], "act", alpha=0.3),
        helper.make_node("Mul", ["r", "k"], ["y"]),
    ]
    model = made(nodes, tensors({"c.weight": weight, **prefixed(values), "k": [2.0]}), ("n", 3, 5, 5))
    model.producer_name, model.doc_string = "somebody", "about"
    helper.set_model_props(model, {"author": "somebody"})
    model.graph.value_info.extend([info("h", None), info("b", None), info("r", None)])
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    after, _ = folded(path)
    assert [n.SerializeToString() for n in after.graph.node[1:]] == [n.SerializeToString() for n in nodes[2:]]
    assert names(after.graph.value_info) == ["b", "r"]
    assert names(after.graph.initializer) == ["c.weight", "k", "bn.folded_bias"]
    for part in (model, after):
        for field in ("node", "initializer", "value_info"):
            part.graph.ClearField(field)
    assert after == model


def test_tolerance_is_what_counts(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": normal(4, 3, 3, 3), **prefixed(parameters(4))})
    path = saved(tmp_path, nodes, initializers, (2, 3, 5, 5))
    assert "above 1e-12" in fold_onnx(path, tolerance=1e-12).changes.left_alone[0].reason
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(UsageError, match="tolerance must be above 0 and finite"):
            fold_onnx(path, tolerance=wrong)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, TensorProto.FLOAT16), (np.float64, TensorProto.DOUBLE)])
def test_other_dtypes_are_rounded_once(tmp_path, dtype, kind):
    weight, values = normal(4, 3, 3, 3).astype(dtype), {k: v.astype(dtype) for k, v in parameters(4).items()}
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    initializers = tensors({"c.weight": weight, **prefixed(values)}, dtype)
    model, changes = folded(saved(tmp_path, nodes, initializers, (2, 3, 5, 5), kind=kind))
    assert changes.left_alone == ()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wide_values = {key: value.astype(np.float64) for key, value in values.items()}
    scale = wide_values["weight"] / np.sqrt(wide_values["running_var"] + np.float64(np.float32(EPS)))
    expected = (weight.astype(np.float64) * scale[:, None, None, None]).astype(dtype)
    shift = (wide_values["bias"] - wide_values["running_mean"] * scale).astype(dtype)
    assert stored["c.weight"].dtype == stored["bn.folded_bias"].dtype == dtype
    # One step where torch and numpy round the square root differently.
    assert np.allclose(stored["c.weight"], expected, rtol=2 * np.finfo(dtype).eps, atol=0)
    assert np.allclose(stored["bn.folded_bias"], shift, rtol=2 * np.finfo(dtype).eps, atol=1e-7)


def test_external_data_is_taken_into_the_model(tmp_path):
    x, weight, values = normal(2, 3, 5, 5), normal(4, 3, 3, 3), parameters(4)
    nodes = [helper.make_node("Conv", ["x", "c.weight"], ["h"]), bn_node()]
    path = saved(tmp_path, nodes, tensors({"c.weight": weight, **prefixed(values)}), (2, 3, 5, 5))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model, _ = folded(path)
    (tmp_path / "w.bin").unlink()
    same(model, x, batch_norm(conv2d(wide(x), wide(weight)).numpy(), values))
    with pytest.raises(DamagedFile, match=r"external data of 'c.weight' must be readable beside the model"):
        fold_onnx(path)


def test_external_data_too_large_for_one_file(tmp_path):
    path = saved(tmp_path, [bn_node("x")], tensors(prefixed(parameters(4))), (2, 4, 3))
    model = onnx.load(path)
    huge = model.graph.initializer.add(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 30])
    huge.data_location = TensorProto.EXTERNAL
    huge.external_data.add(key="location", value="w.bin")
    onnx.save(model, path)
    with pytest.raises(UsageError, match="model must be smaller than 2 GB with its external data, got more"):
        fold_onnx(path)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    with pytest.raises(UnreadableFile, match="no such file"):
        fold_onnx(path)
    path.write_bytes(b"\x08\x04\xff\xff\xff")
    with pytest.raises(DamagedFile, match=r"m\.onnx: file must be a whole ONNX model"):
        fold_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(NotACheckpoint, match=r"m\.onnx: file must be a checkpoint, got an empty file"):
        fold_onnx(path)
    path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    with pytest.raises(NotACheckpoint, match="without a graph"):
        fold_onnx(path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[onnx\]'"):
        fold_onnx(path)


def test_a_model_without_batch_norm_is_written_as_it_is(tmp_path):
    path = saved(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [], (2, 4))
    model, changes = folded(path)
    assert model == onnx.load(path)
    assert changes.changes == changes.left_alone == ()
    assert changes.notes == ("the model has no BatchNormalization node: folded, or never there",)


def test_a_damaged_model_is_no_fault_of_ours_and_a_fault_of_ours_is_not_hidden(tmp_path, monkeypatch):
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"], group=2)
    initializers = tensors({"c.weight": normal(4, 2, 1, 1), **prefixed(parameters(4))})
    path = saved(tmp_path, [conv, bn_node()], initializers, (2, 4, 3, 3))
    whole = path.read_bytes()

    def damage(change):
        model = onnx.load_from_string(whole)
        change(model.graph)
        path.write_bytes(model.SerializeToString())

    damage(lambda graph: graph.node[0].attribute[0].__setattr__("type", onnx.AttributeProto.STRINGS))
    with pytest.raises(DamagedFile, match=r"m\.onnx: file must be a valid ONNX model, got a damaged one: "):
        fold_onnx(path)
    damage(lambda graph: graph.initializer[0].__setattr__("raw_data", b"1234"))
    with pytest.raises(DamagedFile, match=r"m\.onnx: tensor 'c.weight' must hold the values it promises"):
        fold_onnx(path)
    path.write_bytes(whole)
    monkeypatch.setattr(_batch_norm_node, "scale_and_shift", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        fold_onnx(path)


def test_layers_of_the_same_name_and_the_record_as_json(tmp_path):
    values = prefixed(parameters(4))
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["h"]),
        bn_node("h", "b"),
        helper.make_node("Conv", ["b", "c.weight"], ["i"]),
        bn_node("i"),
    ]
    _, changes = folded(saved(tmp_path, nodes, tensors({"c.weight": normal(4, 4, 1), **values}), (2, 4, 3)))
    assert [change.layer for change in changes.changes] == ["bn", "bn#2"]
    assert Changes.from_json(changes.to_json()) == changes
