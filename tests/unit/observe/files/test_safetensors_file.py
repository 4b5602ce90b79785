import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bnlab.errors import BnlabError, TooMuchWork
from bnlab.observe.files.content import open_content
from bnlab.observe.files.safetensors_file import looks_like_safetensors, read_safetensors


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
    tensor = entry(dtype="F4", data_offsets=[8, 9])  # two values of 4 bits
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
    assert read_safetensors(open_content(path)).metadata == {"author": "someone"}
    save_file({"a": torch.ones(2)}, path)
    assert read_safetensors(open_content(path)).metadata is None


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
        ({"a": entry(shape=[True], data_offsets=[0, 4])}, bytes(4)),
        ({"a": entry(shape=[2] + 70 * [1])}, bytes(8)),
        ({"a": entry(dtype="float32")}, bytes(8)),
        ({"a": entry()}, bytes(9)),
        ({"a": entry(), "b": entry()}, bytes(8)),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        ({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
        ({"__metadata__": {"a": 1}}, b""),
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


def is_read(path):
    try:
        read_safetensors(open_content(path))
    except (BnlabError, ValueError, TypeError, RecursionError):
        return False
    return True


def is_read_by_the_library(path):
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


E = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("{}", 0),
        ("{}", 1),
        (f'{{"a":{E}}}   \n', 8),
        (f'{{"a":{E}}}\0', 8),
        (f'{{"a":{E}}} x', 8),
        (f'{{"a":{E}}}', 7),
        (f'{{"":{E}}}', 8),
        (f'{{"__metadata__":null,"a":{E}}}', 8),
        (f'{{"__metadata__":[],"a":{E}}}', 8),
        (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{E}}}', 8),
        (f'{{"__metadata__":{{"a":"\\udc00"}},"a":{E}}}', 8),
        (f'{{"\\ud800":{E}}}', 8),
        (f'{{"\\ud83d\\ude00":{E}}}', 8),
        (f'{{"a\1":{E}}}', 8),
        (f'\ufeff{{"a":{E}}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"dtype":"F32"}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":NaN}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1e999}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":{"y":[1.5]}}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + "[" * 200 + "]" * 200 + "}}", 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', 8),
        ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', 8),
        ('{"a":{"dtype":"F32","shape":[18446744073709551615,0],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F32","shape":[18446744073709551616,0],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', 3),
        (f'{{"a":{E},"b":{{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}}}', 8),
        (f'{{"a":{E},"b":{{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}}}', 8),
        (f'{{"b":{{"dtype":"F32","shape":[1],"data_offsets":[8,12]}},"a":{E}}}', 12),
    ],
)
def test_the_library_refuses_the_same_headers(tmp_path, header, size):
    path = tmp_path / "a.safetensors"
    write(path, header.encode(), bytes(size))
    assert is_read(path) == is_read_by_the_library(path)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (f' {{"a":{E}}}', 8),
        (f'{{"a":{E},"a":{E}}}', 8),
        ('{"__metadata__":{"a":"b","a":"c"}}', 0),
        ('{"a":["F32",[2],[0,8]]}', 8),
        ('{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', 8),
        ('{"a":{"dtype":"F32","shape":[2' + 70 * ",1" + '],"data_offsets":[0,8]}}', 8),
    ],
    ids=["space", "duplicate", "duplicate metadata", "list", "enum", "rank"],
)
def test_what_the_library_reads_although_the_format_forbids_it(tmp_path, header, size):
    path = tmp_path / "a.safetensors"
    write(path, header.encode(), bytes(size))
    assert is_read_by_the_library(path)
    assert not is_read(path)


TOKENS = [
    "F32",
    "F16",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    '"',
    "0",
    "8",
    "1",
    "-",
    ".",
    "e",
    " ",
    "null",
    "true",
    "a",
    "\\u0041",
]


@given(
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 3), st.sampled_from(TOKENS)), max_size=3), st.integers(-1, 1)
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mutated_header_is_read_that_the_library_refuses(tmp_path, changes, more):
    text = f'{{"__metadata__":{{"x":"y"}},"a":{E},"b":{E.replace("[0,8]", "[8,16]")}}}'
    for at, drop, token in changes:
        text = text[:at] + token + text[at + drop :]
    path = tmp_path / "a.safetensors"
    write(path, text.encode(), bytes(16 + more))
    own, library = is_read(path), is_read_by_the_library(path)
    assert own <= library
    assert own == library or text.startswith(" ") or text.count('"a"') > 1 or '"b"' not in text


def test_the_message_names_the_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"tensor 'b' begins at byte 12, and leaves a hole of 4 bytes"):
        read_safetensors(write(tmp_path / "a", {"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)))


def test_a_header_that_describes_too_much_is_not_parsed(tmp_path):
    with pytest.raises(TooMuchWork, match="at most 500,000 names and numbers, got 600,001"):
        read_safetensors(write(tmp_path / "a", b"{" + b"," * 600_000))
