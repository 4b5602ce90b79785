import gzip
import io
import lzma
import struct
import sys
import tarfile
from pathlib import Path

import pytest

from bnlab.errors import NotACheckpoint
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.files.refused_formats import refused_folder, refused_format


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


# the name of a file, its bytes, and what the message says of it
REFUSED = {
    "git lfs": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": ("a.safetensors", b"\n <!DOCTYPE html><html>404</html>", "an HTML page"),
    "html in an onnx": ("a.onnx", b"<html>404</html>", "an HTML page"),
    "gguf": ("a.bin", b"GGUF\3\0\0\0" + bytes(16), "a GGUF model"),
    "mxnet": ("a.params", struct.pack("<QQ", 0x112, 0), "parameters of MXNet"),
    "tflite": ("a.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model"),
    "openvino": ("a.xml", b'<?xml version="1.0"?><net name="a">', "OpenVINO"),
    "matlab": ("a.mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "scipy.io.loadmat"),
    "ncnn": ("a.param", b"7767517\n75 83\n", "NCNN"),
    "tf index": (
        "model.ckpt.index",
        bytes(40) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
        "the index of a TensorFlow checkpoint",
    ),
    "tf data": ("variables.data-00000-of-00001", b"\x01\x02" * 40, "the data of a TensorFlow checkpoint"),
    "saved model": ("saved_model.pb", b"\x08\x01\x12\x02\x0a\x00", "a TensorFlow graph"),
    "caffe": ("a.caffemodel", b"\x0a\x04net", "a Caffe model"),
    "core ml": ("a.mlmodel", b"\x08\x05\x12\x02\x0a\x00", "a Core ML model"),
    "darknet": ("yolo.weights", struct.pack("<3i", 0, 2, 0) + bytes(40), "weights of Darknet"),
    "tensorrt": ("a.engine", b"ftrt" + bytes(40), "a TensorRT engine"),
    "png": ("a.pt", b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture"),
    "jpeg": ("a.pt", b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG picture"),
    "pdf": ("a.pt", b"%PDF-1.7\n", "a PDF document"),
    "json": ("config.json", b'{"a": 1}', "a JSON text"),
    "gzip": ("a.pt.gz", gzip.compress(b"x"), "a gzip archive. Unpack it: gunzip FILE"),
    "xz": ("a.pt.xz", lzma.compress(b"x"), "an xz archive"),
    "zstd": ("a.pt.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "a zstd archive"),
    "7z": ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive"),
    "tar": ("a.pt", tar(), "a tar archive. Unpack it"),
    "mobile": ("a.ptl", b"\x1c\0\0\0PTMF" + bytes(20), "PyTorch Mobile"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_format_is_named_with_the_way_out(tmp_path, kind):
    name, content, text = REFUSED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NotACheckpoint) as error:
        read_checkpoint(tmp_path / name, Hyperparameters())
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="programs of Linux")
def test_a_program():
    with Path(sys.executable).open("rb") as program:
        assert refused_format("a", program.read(512)).startswith("a compiled library")


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in ("html in an onnx",)])
def test_the_bytes_decide_where_a_format_has_a_signature(kind):
    _, content, _ = REFUSED[kind]
    by_suffix = {"tf data", "saved model", "caffe", "core ml"}
    assert (refused_format("x", content[:512], content[-64:]) is None) == (kind in by_suffix)


def test_unknown_bytes_have_no_name():
    assert refused_format("a.bin", bytes(range(130, 230))) is None
    assert refused_format("a.pt", b"[1\xff") is None
    assert refused_format("a.pt", b"") is None


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"saved_model.pb", "variables", "assets"}, "a SavedModel of TensorFlow"),
        ({"_CHECKPOINT_METADATA", "default"}, "a checkpoint of Orbax"),
        ({"manifest.ocdbt", "d", "_METADATA"}, "a checkpoint of Orbax"),
        ({"Manifest.json", "Data"}, "a Core ML package"),
        ({"checkpoint", "m.ckpt.index", "m.ckpt.data-00000-of-00001"}, "a checkpoint of TensorFlow"),
    ],
)
def test_folders_that_are_one_model(names, text):
    assert refused_folder(frozenset(names)).startswith(text)


def test_an_ordinary_folder():
    assert refused_folder(frozenset({"a.pt", "config.json"})) is None
