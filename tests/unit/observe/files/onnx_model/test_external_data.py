import os

import pytest

pytest.importorskip("onnx")
from onnx import TensorProto

from bnlab.errors import DamagedFile
from bnlab.observe.files.content import open_content
from bnlab.observe.files.onnx_model.external_data import ModelFile


def external(**entries):
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "model" / "w.bin").write_bytes(b"0123456789")
    (tmp_path / "model" / "below").mkdir()
    (tmp_path / "model" / "below" / "w.bin").write_bytes(b"abcdefgh")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("entries", "content"),
    [
        ({"location": "w.bin"}, b"01234567"),
        ({"location": "w.bin", "offset": "2", "length": "8"}, b"23456789"),
        ({"location": "below/w.bin"}, b"abcdefgh"),
        ({"location": "./below/w.bin"}, b"abcdefgh"),
    ],
)
def test_bytes_beside_the_model(folder, entries, content):
    assert ModelFile(folder).span(external(**entries), 8).read() == content


def test_the_empty_location_is_the_model_itself(folder):
    content = open_content(folder / "w.bin")
    assert ModelFile(folder, content).span(external(location="", offset="1"), 8).read() == b"12345678"


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"location": ""},
        {"location": "absent.bin"},
        {"location": "../secret.bin"},
        {"location": "below/../../secret.bin"},
        {"location": "/etc/hostname"},
        {"location": "below"},
        {"location": "a\0b"},
        {"location": "link.bin"},
        {"location": "way/secret.bin"},
        {"location": "pipe"},
        {"location": "device"},
        {"location": "loop/w.bin"},
        {"location": "empty.bin"},
        {"location": "w.bin", "offset": "3"},
        {"location": "w.bin", "offset": "-1"},
        {"location": "w.bin", "offset": "9" * 400},
        {"location": "w.bin", "offset": "one"},
        {"location": "w.bin", "length": "4"},
        {"location": "w.bin", "length": "-1"},
        {"location": "w.bin", "length": "\u0663"},
    ],
)
def test_everything_else_is_refused_at_once(folder, entries):
    (folder / "link.bin").symlink_to(folder / "w.bin")
    (folder / "way").symlink_to(folder.parent)
    (folder / "device").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "empty.bin").touch()
    os.mkfifo(folder / "pipe")
    with pytest.raises(DamagedFile, match="external data of 'w' must be readable beside the model, got no such data"):
        ModelFile(folder).span(external(**entries), 8)


def test_more_bytes_than_the_dims_need_are_refused(folder):
    with pytest.raises(DamagedFile, match="got a length of 10 bytes for a tensor of 8 bytes in 'w"):
        ModelFile(folder).span(external(location="w.bin", length="10"), 8)


@pytest.fixture
def cache(tmp_path):
    """A cache as Hugging Face lays it out: the names of a snapshot are links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "3f2a" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for blob, name, content in (("abc", "model.onnx", b"model"), ("def", "model.onnx_data", b"01234567")):
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    return snapshot / "model.onnx"


def test_a_link_that_leads_beside_the_model_is_followed(cache):
    assert ModelFile.at(cache).span(external(location="model.onnx_data"), 8).read() == b"01234567"


def test_a_link_in_the_folder_of_a_model_that_is_no_link_is_followed(folder):
    (folder / "model.onnx").touch()
    (folder / "link.bin").symlink_to("w.bin")
    assert ModelFile.at(folder / "model.onnx").span(external(location="link.bin"), 8).read() == b"01234567"


@pytest.mark.parametrize(
    "target", ["secret", "blobs/below/w", "/dev/zero", "blobs/pipe", "blobs/below", "blobs/absent", "blobs/loop"]
)
def test_a_link_that_leads_elsewhere_is_refused(cache, tmp_path, target):
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "blobs" / "below").mkdir()
    (tmp_path / "blobs" / "below" / "w").write_bytes(bytes(8))
    (tmp_path / "blobs" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "blobs" / "pipe")
    (cache.parent / "link").symlink_to(tmp_path / target)
    with pytest.raises(DamagedFile, match="must be readable beside the model, got no such data in 'link'"):
        ModelFile.at(cache).span(external(location="link"), 8)


def test_a_folder_that_is_a_link_out_of_the_folder_is_refused(cache, tmp_path):
    (cache.parent / "way").symlink_to(tmp_path / "blobs")
    with pytest.raises(DamagedFile, match="got no such data"):
        ModelFile.at(cache).span(external(location="way/def"), 8)
