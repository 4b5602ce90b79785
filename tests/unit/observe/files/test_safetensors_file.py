import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bnlab.observe.files.content import open_content
from bnlab.observe.files.safetensors_file import looks_like_safetensors, read_metadata, read_safetensors


def test_tensors_read_as_the_library_reads_them(tmp_path):
    path = tmp_path / "a.safetensors"
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
    tensors = {str(dtype): (10 * torch.randn(2, 3)).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(3)}
    save_file(tensors, path, metadata={"format": "pt"})
    assert looks_like_safetensors(path.read_bytes())
    tree, loaded = read_safetensors(open_content(path)), load_file(path)
    assert tree.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert tree[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert np.array_equal(tree[name].read().astype(np.float64), tensor.double().numpy())


def test_a_dtype_nobody_needs_does_not_stop_the_others(tmp_path):
    tensor = entry(dtype="F4", data_offsets=[8, 9])
    tree = read_safetensors(write(tmp_path / "a.safetensors", {"a": entry(), "b": tensor}, bytes(9)))
    assert tree["b"].dtype == "F4"
    assert (tree["a"].read() == 0).all()
    with pytest.raises(ValueError, match="dtype F4 cannot be read"):
        tree["b"].bits()


def test_dtypes_that_numpy_does_not_have_are_read_as_bits(tmp_path):
    dtypes = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.complex64)
    tensors = {str(dtype).removeprefix("torch."): torch.tensor([1.0, 2.5]).to(dtype) for dtype in dtypes}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    tree = read_safetensors(open_content(path))
    assert {name: stored.dtype for name, stored in tree.items()} == {name: name for name in tensors}
    for name, tensor in tensors.items():
        assert tree[name].bits().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_metadata_is_what_lies_beside_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path, {"author": "someone"})
    assert read_metadata(open_content(path)) == {"author": "someone"}
    save_file({"a": torch.ones(2)}, path)
    assert read_metadata(open_content(path)) is None


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return open_content(path)


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{not json", b""),
        (b"[1, 2]", b""),
        (b"\xff\xfe{", b""),
        ({"a": 1}, b""),
        ({"a": {}}, b""),
        ({"a": entry(data_offsets=[0])}, bytes(8)),
        ({"a": entry(data_offsets=[0, 9])}, bytes(8)),
        ({"a": entry(data_offsets=[-8, 0])}, bytes(8)),
        ({"a": entry(data_offsets=[8, 0])}, bytes(8)),
        ({"a": entry(data_offsets=[0.0, 8.0])}, bytes(8)),
        ({"a": entry(shape=[3])}, bytes(8)),
        ({"a": entry(shape=[-2])}, bytes(8)),
        ({"a": entry(shape=["2"])}, bytes(8)),
    ],
)
def test_a_corrupt_header_is_a_value_or_type_error(tmp_path, header, data):
    with pytest.raises((ValueError, TypeError)):
        read_safetensors(write(tmp_path / "a.safetensors", header, data))


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(ValueError, match=r"claims 1099511627776 bytes, the file has 10"):
        read_safetensors(open_content(path))
