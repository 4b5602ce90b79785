import os

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402
from tests.unit.remedies.fold_onnx.samples import normal, saved, tensors  # noqa: E402

from bnlab.errors import DamagedFile, UnreadableFile  # noqa: E402
from bnlab.remedies.fold_onnx.loading import load_whole  # noqa: E402

pytestmark = pytest.mark.cpu_only("an ONNX model runs on the CPU")


def external(tmp_path, **constants):
    path = saved(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], tensors(constants), (2, 3))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def test_external_data_is_read_in(tmp_path):
    values = {"a": normal(3, 4), "b": normal(5)}
    model = load_whole(external(tmp_path, **values))
    for tensor in model.graph.initializer:
        assert not tensor.external_data
        assert np.array_equal(numpy_helper.to_array(tensor), values[tensor.name].astype(np.float32))


@pytest.mark.parametrize(("key", "value"), [("location", "../w.bin"), ("location", "/dev/zero"), ("offset", "9" * 12)])
def test_external_data_that_leads_elsewhere(tmp_path, key, value):
    path = external(tmp_path, a=normal(3))
    model = onnx.load(path, load_external_data=False)
    entry = next((part for part in model.graph.initializer[0].external_data if part.key == key), None)
    if entry is None:
        model.graph.initializer[0].external_data.add(key=key, value=value)
    else:
        entry.value = value
    onnx.save(model, path)
    with pytest.raises(DamagedFile, match=r"m\.onnx: external data of 'a' must be readable beside the model"):
        load_whole(path)


@pytest.mark.parametrize("damage", [{"dims": [-1]}, {"data_type": 99}, {"data_type": onnx.TensorProto.STRING}])
def test_external_data_of_an_impossible_kind(tmp_path, damage):
    path = external(tmp_path, a=normal(3))
    model = onnx.load(path, load_external_data=False)
    if "dims" in damage:
        model.graph.initializer[0].ClearField("dims")
    model.graph.initializer[0].MergeFrom(onnx.TensorProto(**damage))
    onnx.save(model, path)
    with pytest.raises(DamagedFile, match=r"m\.onnx: tensor 'a' must hold the values it promises, got others"):
        load_whole(path)


def test_external_data_in_a_file_whose_name_is_no_text(tmp_path):
    path = external(tmp_path, a=normal(3))
    path.write_bytes(path.read_bytes().replace(b"w.bin", b"\xff.bin"))
    with pytest.raises(DamagedFile, match=r"m\.onnx: tensor 'a' must hold the values it promises, got others"):
        load_whole(path)


def test_external_data_in_a_cache_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "3f2a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    value = normal(3)
    external(tmp_path, a=value).rename(blobs / "abc")
    (tmp_path / "w.bin").rename(blobs / "def")
    for name, blob in (("model.onnx", "abc"), ("w.bin", "def")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    (tensor,) = load_whole(snapshot / "model.onnx").graph.initializer
    assert np.array_equal(numpy_helper.to_array(tensor), value.astype(np.float32))
    (blobs / "def").rename(tmp_path / "def")
    (snapshot / "w.bin").unlink()
    (snapshot / "w.bin").symlink_to("../../def")
    with pytest.raises(DamagedFile, match="must be readable beside the model"):
        load_whole(snapshot / "model.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    path = tmp_path / "m.onnx"
    os.mkfifo(path)
    with pytest.raises(UnreadableFile, match=r"m\.onnx: file must be a regular file"):
        load_whole(path)
