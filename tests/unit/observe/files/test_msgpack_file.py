import struct

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.samples import layer_state

from bnlab.errors import DamagedFile, TooMuchWork
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import looks_like_checkpoint, read_checkpoint
from bnlab.observe.files.content import open_content
from bnlab.observe.files.msgpack_file import looks_like_msgpack, read_msgpack
from bnlab.observe.files.tensors import StoredTensor

STATE = {key: value.numpy() for key, value in layer_state().items() if value.ndim}


def inside(array, dtype=None):
    """Pack an array as flax.serialization does: its shape, the name of its dtype, and its bytes."""
    return msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes()), use_bin_type=True)


def extension(value):
    if isinstance(value, np.ndarray):
        return msgpack.ExtType(1, inside(value))
    if isinstance(value, complex):
        return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
    return msgpack.ExtType(3, inside(np.asarray(value)))


def packed(tree):
    """Return the bytes that flax.serialization.msgpack_serialize writes for a tree."""
    return msgpack.packb(tree, default=extension, strict_types=True)


def chunked(array, size):
    """Split an array as Flax does above 1 GB."""
    flat = array.reshape(-1)
    chunks = [flat[at : at + size] for at in range(0, flat.size, size)]

    def numbered(values):
        return {str(index): value for index, value in enumerate(values)}

    return {"__msgpack_chunked_array__": True, "shape": numbered(array.shape), "chunks": numbered(chunks)}


def read(path, data):
    path.write_bytes(data)
    return read_msgpack(open_content(path))


def numbers(value):
    """Replace the unread tensors of a tree by arrays."""
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def test_arrays_read_as_they_were_written(tmp_path):
    random = np.random.default_rng(0)
    dtypes = ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")
    tree = {name: (9 * random.normal(size=(3, 4))).astype(name) for name in dtypes}
    tree |= {"scalar": np.float32(3), "large": random.normal(size=(300, 400)), "chunked": chunked(tree["float32"], 5)}
    result = numbers(read(tmp_path / "a", packed(tree)))
    for name, value in (tree | {"chunked": tree["float32"]}).items():
        assert np.array_equal(result[name], value), name


def test_bfloat16_and_an_unknown_dtype(tmp_path):
    bits = np.array([0x3FC0, 0xC000], dtype=np.uint16)
    tree = {name: msgpack.ExtType(1, inside(bits, name)) for name in ("bfloat16", "int4")}
    result = read(tmp_path / "a", packed(tree))
    assert result["bfloat16"].read().tolist() == [1.5, -2.0]
    with pytest.raises(ValueError, match="int4 cannot be read"):
        result["int4"].read()


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20)
)


@given(trees)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_trees_read_as_the_library_reads_them(tmp_path, tree):
    data = msgpack.packb(tree)
    assert read(tmp_path / "a", data) == msgpack.unpackb(data, strict_map_key=False)


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65535, 65536, 70000])
def test_sizes_at_the_borders_of_the_format(tmp_path, size):
    tree = {
        "text": "x" * size,
        "list": [1] * size,
        "map": {str(index): 1 for index in range(size)},
        "bytes": bytes(size),
    }
    result = read(tmp_path / "a", msgpack.packb(tree))
    assert result.pop("bytes").read() == tree.pop("bytes")
    assert result == tree


@pytest.mark.parametrize("suffix", [".msgpack", ".ckpt", ""])
def test_the_layers_of_flax(tmp_path, suffix):
    tree = {
        "params": {"block": {"bn": {"scale": STATE["weight"], "bias": STATE["bias"]}}},
        "batch_stats": {"block": {"bn": {"mean": STATE["running_mean"], "var": STATE["running_var"]}}},
        "step": np.int32(7),
        "opt_state": {"0": {"mu": {"block": {"bn": {"scale": STATE["weight"], "bias": STATE["bias"]}}}}},
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed(tree))
    assert looks_like_checkpoint(path)
    (network,) = read_checkpoint(path, Hyperparameters()).networks
    (layer,) = network.layers
    assert layer.name == "block/bn"
    assert layer.running_var.tolist() == STATE["running_var"].astype(float).tolist()
    assert layer.weight.tolist() == STATE["weight"].astype(float).tolist()
    assert layer.hyperparameters == Hyperparameters().of_house("Flax", 0.01, 1e-5)


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1",
        b"\x81\xa1a",
        b"\x81\xa1a\xc1",
        b"\x81\xa1a\x01\x01",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\x81\x90\x01",
        b"\x81\xa1a\xd9\x02\xff\xff",
        b"\x81\xa1a" + b"\x91" * 100 + b"\xc0",
        packed({"a": msgpack.ExtType(1, b"")}),
        packed({"a": msgpack.ExtType(1, msgpack.packb(((2,), "float32", bytes(7))))}),
        packed({"a": msgpack.ExtType(1, msgpack.packb(((-2,), "float32", bytes(8))))}),
        packed({"a": msgpack.ExtType(1, msgpack.packb(((2,), "float32", bytes(8))) + b"\0")}),
        packed({"a": msgpack.ExtType(1, msgpack.packb(((1,) * 70, "float32", bytes(4))))}),
        packed({"a": {"__msgpack_chunked_array__": True}}),
        packed({"a": chunked(np.ones((2, 2)), 3) | {"shape": {"0": 3}}}),
        packed({"a": chunked(np.ones((2, 2)), 3) | {"chunks": {"1": np.ones(4)}}}),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, data):
    path = tmp_path / "a.msgpack"
    path.write_bytes(data)
    with pytest.raises(DamagedFile):
        read_checkpoint(path, Hyperparameters())


def test_extensions_within_extensions_end(tmp_path):
    value = b"\xc0"
    for _ in range(2000):
        value = msgpack.packb(msgpack.ExtType(1, value))
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        read(tmp_path / "a", b"\x81\xa1a" + value)


def test_more_values_than_any_checkpoint_holds(tmp_path):
    count = 5_000_000
    with pytest.raises(TooMuchWork, match="objects"):
        read(tmp_path / "a", b"\x81\xa1a\xdd" + struct.pack(">I", count) + b"\xc0" * count)


@pytest.mark.parametrize(
    "head", [b"", b"\x80\x04", b"\x81", b"\x82\x83\x84", b"\x81\xa3ab", b"\x81\xa1\x00", b"\x08\x08", b"PK"]
)
def test_what_does_not_begin_like_a_map_with_names(head):
    assert not looks_like_msgpack(head)


def test_what_begins_like_a_map_with_names():
    assert looks_like_msgpack(packed({"params": 1}))
    assert looks_like_msgpack(packed({f"{index}": 1 for index in range(20)}))
    assert looks_like_msgpack(packed({"a" * 40: 1}))
