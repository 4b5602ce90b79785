"""Names the formats that bnlab does not read by their first bytes, each with the way out."""

from __future__ import annotations

import struct

__all__ = ["HEAD_BYTES", "refused_folder", "refused_format"]

HEAD_BYTES = 512
"""Number of the first bytes that `refused_format` looks at."""

_STATE_DICT = "Save the state dict of the model: torch.save(model.state_dict(), path)"
_UNPACK = "Unpack it and give the checkpoint inside"
_NPZ = "numpy.savez(path, **arrays)"
_TO_ONNX = "Give the model that it was converted from, or export that to ONNX"
_TENSORFLOW = f"Load the variables with TensorFlow and save them by name: {_NPZ}"

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer. Fetch the file itself: git lfs pull"),
    (b"# xet version", "a Xet pointer of Hugging Face. Fetch the file itself: hf download REPOSITORY FILE"),
    (b"GGUF", "a GGUF model of llama.cpp. Give the checkpoint that it was converted from"),
    (b"ggml", "a GGML model. Give the checkpoint that it was converted from"),
    (b"\x12\x01\0\0\0\0\0\0", f"parameters of MXNet. Convert them: mx.nd.load(path), then {_NPZ}"),
    (b"TDF$", f"an ONNX Runtime model of an old version. {_TO_ONNX}"),
    (b"MATLAB 5.0 MAT-file", f"a MATLAB file. Convert it: scipy.io.loadmat(path), then {_NPZ}"),
    (b"MATLAB 7.3 MAT-file", f"a MATLAB file. Convert it: h5py.File(path), then {_NPZ}"),
    (b"RDX", f"an R workspace. Save the numbers by name: {_NPZ}"),
    (b"7767517\n", f"a network description of NCNN. {_TO_ONNX}"),
    (b"ftrt", f"a TensorRT engine. {_TO_ONNX}"),
    (b"ptrt", f"a TensorRT engine. {_TO_ONNX}"),
    (b"\x1f\x8b", "a gzip archive. Unpack it: gunzip FILE"),
    (b"\xfd7zXZ\0", "an xz archive. Unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive. Unpack it: unzstd FILE"),
    (b"BZh", "a bzip2 archive. Unpack it: bunzip2 FILE"),
    (b"\x04\x22\x4d\x18", "an lz4 archive. Unpack it: unlz4 FILE"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive. {_UNPACK}"),
    (b"Rar!\x1a\x07", f"a RAR archive. {_UNPACK}"),
    (b"\x89PNG\r\n", "a PNG picture. Give a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG picture. Give a checkpoint"),
    (b"GIF8", "a GIF picture. Give a checkpoint"),
    (b"%PDF-", "a PDF document. Give a checkpoint"),
    (b"\x7fELF", "a compiled library. Check the model or the program from which it was compiled"),
    (b"MZ", "a program or library of Windows. Give a checkpoint"),
    (b"\xcf\xfa\xed\xfe", "a program or library of macOS. Give a checkpoint"),
    (b"SQLite format 3\0", "an SQLite database. Give a checkpoint"),
    (b"PAR1", "a Parquet table. Give a checkpoint"),
    (b"ARROW1", "an Arrow table. Give a checkpoint"),
)
_INSIDE: tuple[tuple[int, bytes, str], ...] = (
    (4, b"TFL3", f"a TensorFlow Lite model. {_TO_ONNX}"),
    (4, b"ORTM", f"a model of ONNX Runtime (.ort). {_TO_ONNX}"),
    (4, b"PTMF", "a program of PyTorch Mobile. Check the model from which it was made"),
    (257, b"ustar", f"a tar archive. {_UNPACK}"),
    (8, b"WEBP", "a WebP picture. Give a checkpoint"),
)
_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "an HTML page. Download the file again: a server answered with a page instead"),
    (b"<html", "an HTML page. Download the file again: a server answered with a page instead"),
    (b"<?xml", f"an XML text, such as a network of OpenVINO. {_TO_ONNX}"),
    (b"<net ", f"a network of OpenVINO. {_TO_ONNX}"),
)
_BY_SUFFIX = {
    ".index": f"the index of a TensorFlow checkpoint. {_TENSORFLOW}",
    ".pb": f"a TensorFlow graph. {_TENSORFLOW}",
    ".mlmodel": f"a Core ML model. {_TO_ONNX}",
    ".caffemodel": f"a Caffe model. Convert it to torch, or read it with caffe.Net and save it: {_NPZ}",
    ".weights": f"weights of Darknet, which have no names. {_STATE_DICT}",
    ".params": f"parameters of MXNet. Convert them: mx.nd.load(path), then {_NPZ}",
    ".mat": f"a MATLAB file. Convert it: scipy.io.loadmat(path), then {_NPZ}",
    ".joblib": f"an object that joblib pickled. {_STATE_DICT}",
    ".engine": f"a TensorRT engine. {_TO_ONNX}",
    ".plan": f"a TensorRT engine. {_TO_ONNX}",
    ".param": f"a network description of NCNN. {_TO_ONNX}",
    ".pdiparams": "parameters of a Paddle inference model, which have no names. Save a state dict: paddle.save(...)",
    ".pdmodel": "a Paddle inference model. Save a state dict: paddle.save(model.state_dict(), 'name.pdparams')",
}
_TEXT_BYTES = 64
_DATA_OF_TENSORFLOW = ".data-"
_TABLE_MAGIC = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_DARKNET_VERSIONS = ((0, 1, 0), (0, 2, 0), (0, 2, 5))


def refused_format(name: str, head: bytes, tail: bytes = b"") -> str | None:
    """Return the format of a file that bnlab does not read, and the way out; None for bytes that it cannot name.

    The bytes decide. Some formats have no signature: there the bytes and the suffix decide together.

    Args:
        name: The name of the file.
        head: Its first bytes.
        tail: Its last bytes.
    """
    for start, text in _BEGINNINGS:
        if head.startswith(start):
            return text
    for at, mark, text in _INSIDE:
        if head[at : at + len(mark)] == mark:
            return text
    start = head.lstrip().lower()
    for mark, text in _MARKUP:
        if start.startswith(mark):
            return text
    return _by_structure(name, head, tail)


def refused_folder(names: frozenset[str]) -> str | None:
    """Return the format of a folder that is one model of another library, and the way out; None for other folders.

    Args:
        names: The names of the files and folders in it.
    """
    if "saved_model.pb" in names or "saved_model.pbtxt" in names:
        return f"a SavedModel of TensorFlow. {_TENSORFLOW}, or save it as .keras"
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        return f"a checkpoint of Orbax. Restore it, and save its arrays by name: {_NPZ}"
    if any(_DATA_OF_TENSORFLOW in name for name in names):
        return f"a checkpoint of TensorFlow. {_TENSORFLOW}"
    if "Manifest.json" in names and "Data" in names:
        return f"a Core ML package. {_TO_ONNX}"
    return None


def _by_structure(name: str, head: bytes, tail: bytes) -> str | None:
    if tail.endswith(_TABLE_MAGIC):
        return _BY_SUFFIX[".index"]
    if head[:1] in (b"{", b"[") and head[:_TEXT_BYTES].isascii():
        return "a JSON text. Give the file of tensors beside it"
    if len(head) >= 12 and struct.unpack_from("<3i", head) in _DARKNET_VERSIONS:
        return _BY_SUFFIX[".weights"]
    if _DATA_OF_TENSORFLOW in name:
        return f"the data of a TensorFlow checkpoint. {_TENSORFLOW}"
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    return _BY_SUFFIX.get(suffix)
