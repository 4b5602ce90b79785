"""Files of numpy, Keras, Flax and torch.distributed that cost more than their bytes."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tests.hostile.case import hostile
from tests.hostile.opcodes import END, KEYS, START, dictionary, get, named, put, text
from tests.hostile.pickles import FOREIGN, MANY, READ_OR_REFUSED, SHARED_TUPLE, times


def header(text: str) -> bytes:
    """Encode the header of an .npy file."""
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text.encode()


def described(shape: str, dtype: str = "<f4") -> bytes:
    """Encode the header of an .npy file with a shape."""
    return header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n")


def npz(folder: Path, members: dict[str, bytes]) -> Path:
    """Write an .npz file."""
    path = folder / "hostile.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def layer(data: bytes, name: str = "bn") -> dict[str, bytes]:
    """Name the four members of a BN layer."""
    return {f"{name}.{key}": data for key in KEYS}


@hostile("npz", "a shape of 10**15 values")
def giant_shape(folder: Path) -> Path:
    return npz(folder, layer(described(f"({10**15},)") + bytes(16)))


@hostile("npz", "a shape of 300k dimensions", codes=READ_OR_REFUSED)
def high_rank(folder: Path) -> Path:
    return npz(folder, layer(described("(" + "1," * 300_000 + ")") + bytes(4)))


@hostile("npz", "a header of 100k nested brackets")
def nested_header(folder: Path) -> Path:
    return npz(folder, layer(header("(" * 100_000)))


@hostile("npz", "a header of 4 GB")
def giant_header(folder: Path) -> Path:
    return npz(folder, layer(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"))


@hostile("npz", "a header that is a power of powers")
def power(folder: Path) -> Path:
    return npz(folder, layer(described("(9**9**9**9,)")))


@hostile("npz", "members that unpack to 300 MB", codes=READ_OR_REFUSED)
def bomb(folder: Path) -> Path:
    return npz(folder, layer(described("(75000000,)") + bytes(300_000_000)))


@hostile("npz", "100 layers of 1M zeros", codes=READ_OR_REFUSED)
def many_bombs(folder: Path) -> Path:
    data = described("(1048576,)") + bytes(4 << 20)
    return npz(folder, {key: value for n in range(25) for key, value in layer(data, f"bn{n}").items()})


@hostile("npz", "pickled objects", codes=READ_OR_REFUSED)
def objects(folder: Path) -> Path:
    pickled = START + SHARED_TUPLE + times(MANY, FOREIGN + get(1) + b"R") + END
    return npz(folder, layer(described("(1,)", "|O") + pickled))


@hostile("npz", "30k members", codes=READ_OR_REFUSED)
def many_members(folder: Path) -> Path:
    return npz(folder, {f"bn{n}.running_mean": described("(0,)") for n in range(30_000)})


def hdf5(folder: Path, write: Callable[[Any], None]) -> Path:
    """Write a file of HDF5."""
    import h5py

    path = folder / "hostile.h5"
    with h5py.File(path, "w") as file:
        write(file)
    return path


@hostile("h5", "300 layers of 1M zeros in packed blocks", codes=READ_OR_REFUSED, needs="h5py")
def packed_zeros(folder: Path) -> Path:
    def write(file: Any) -> None:
        for number in range(75):
            for key in ("moving_mean", "moving_variance", "gamma", "beta"):
                file.create_dataset(f"bn{number}/{key}", (1 << 20,), "f4", chunks=(1 << 20,), compression="gzip")

    return hdf5(folder, write)


@hostile("h5", "data sets of 2**50 values without data", codes=READ_OR_REFUSED, needs="h5py")
def giant_dataset(folder: Path) -> Path:
    def write(file: Any) -> None:
        for key in ("moving_mean", "moving_variance", "gamma", "beta"):
            file.create_dataset(f"bn/{key}", (1 << 50,), "f4", chunks=(1 << 20,))

    return hdf5(folder, write)


@hostile("h5", "a group in itself, by hard and soft links", codes=READ_OR_REFUSED, needs="h5py")
def cyclic_group(folder: Path) -> Path:
    def write(file: Any) -> None:
        import h5py

        group = file.create_group("bn")
        for number in range(8):
            group[f"hard{number}"] = file["/"]
            group[f"soft{number}"] = h5py.SoftLink("/bn")
        group["moving_mean"] = np.zeros(3, dtype=np.float32)

    return hdf5(folder, write)


@hostile("h5", "2**60 paths through 60 groups", codes=READ_OR_REFUSED, needs="h5py")
def laughing_groups(folder: Path) -> Path:
    def write(file: Any) -> None:
        group = file.create_group("g0")
        group["moving_mean"] = group["moving_variance"] = np.ones(3, dtype=np.float32)
        for level in range(60):
            outer = file.create_group(f"g{level + 1}")
            outer["a"] = outer["b"] = group
            group = outer

    return hdf5(folder, write)


@hostile("h5", "external links and external storage in /dev/zero", codes=READ_OR_REFUSED, needs="h5py")
def external(folder: Path) -> Path:
    def write(file: Any) -> None:
        import h5py

        file["bn/link"] = h5py.ExternalLink("/dev/zero", "/")
        for key in ("moving_mean", "moving_variance", "gamma", "beta"):
            file.create_dataset(f"bn/{key}", (4,), "f4", external=[("/dev/zero", 0, 16)])

    return hdf5(folder, write)


@hostile("h5", "3k nested groups", codes=READ_OR_REFUSED, needs="h5py")
def nested_groups(folder: Path) -> Path:
    def write(file: Any) -> None:
        group = file
        for _ in range(3_000):
            group = group.create_group("g")
        group["moving_mean"] = group["moving_variance"] = np.ones(3, dtype=np.float32)

    return hdf5(folder, write)


@hostile("h5", "a cut file", needs="h5py")
def cut(folder: Path) -> Path:
    path = hdf5(
        folder, lambda file: file.create_dataset("bn/moving_mean", (100_000,), "f4", data=np.ones(100_000)) and None
    )
    path.write_bytes(path.read_bytes()[:3_000])
    return path


def msgpack(folder: Path, data: bytes) -> Path:
    """Write a file of msgpack."""
    path = folder / "hostile.msgpack"
    path.write_bytes(data)
    return path


def key(name: str) -> bytes:
    """Encode a short string."""
    return bytes([0xA0 | len(name)]) + name.encode()


def flax(array: bytes) -> bytes:
    """Encode batch_stats with arrays of Flax, which are extensions of type 1."""
    value = b"\xc9" + struct.pack(">IB", len(array), 1) + array
    layer = b"\x82" + key("mean") + value + key("var") + value
    return b"\x81" + key("batch_stats") + b"\x81" + key("bn") + layer


@hostile("msgpack", "a list of 2**32-1 elements")
def giant_list(folder: Path) -> Path:
    return msgpack(folder, b"\x81" + key("batch_stats") + b"\xdd\xff\xff\xff\xff")


@hostile("msgpack", "a string of 4 GB")
def giant_string(folder: Path) -> Path:
    return msgpack(folder, b"\x81" + key("batch_stats") + b"\xdb\xff\xff\xff\xff")


@hostile("msgpack", "1M nested lists")
def nested_lists(folder: Path) -> Path:
    return msgpack(folder, b"\x81" + key("batch_stats") + b"\x91" * 1_000_000 + b"\xc0")


@hostile("msgpack", "20M empty lists", codes=READ_OR_REFUSED)
def many_lists(folder: Path) -> Path:
    return msgpack(
        folder, b"\x81" + key("batch_stats") + b"\xdd" + struct.pack(">I", 20_000_000) + b"\x90" * 20_000_000
    )


@hostile("msgpack", "an array of 2**62 values")
def giant_array(folder: Path) -> Path:
    shape = b"\x91\xcf" + struct.pack(">Q", 1 << 62)
    return msgpack(folder, flax(b"\x93" + shape + key("float32") + b"\xc4\x04\0\0\0\0"))


@hostile("msgpack", "an array of 100k dimensions", codes=READ_OR_REFUSED)
def array_of_high_rank(folder: Path) -> Path:
    shape = b"\xdd" + struct.pack(">I", 100_000) + b"\x01" * 100_000
    return msgpack(folder, flax(b"\x93" + shape + key("float32") + b"\xc4\x04\0\0\0\0"))


def distributed(folder: Path, metadata: bytes) -> Path:
    """Write the folder of torch.distributed.checkpoint."""
    path = folder / "distributed"
    path.mkdir()
    (path / ".metadata").write_bytes(metadata)
    (path / "__0_0.distcp").write_bytes(bytes(64))
    return path


@hostile("distributed", "20k foreign objects share one tuple of 200k in .metadata")
def shared_metadata(folder: Path) -> Path:
    return distributed(folder, START + SHARED_TUPLE + times(MANY, FOREIGN + get(1) + b"R") + END)


@hostile("distributed", "30M opcodes in .metadata")
def long_metadata(folder: Path) -> Path:
    return distributed(folder, START + b"N0" * 15_000_000 + b"N" + END)


@hostile("distributed", "20k tensors of 20k dimensions in .metadata")
def metadata_of_high_rank(folder: Path) -> Path:
    size = named("torch", "Size") + b"((" + b"K\x01" * MANY + b"ttR" + put(1) + b"0"
    kind = named("torch.distributed.checkpoint.metadata", "TensorStorageMetadata")
    entries = b"".join(
        text(f"bn{n}.running_mean") + kind + b")\x81}" + text("size") + get(1) + b"sb" for n in range(MANY)
    )
    whole = named("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81"
    state = dictionary(text("state_dict_metadata"), b"}(" + entries + b"u", text("storage_data"), b"}")
    return distributed(folder, START + size + whole + state + b"b" + END)


@hostile("distributed", "50k shards of one file", codes=READ_OR_REFUSED)
def many_shards(folder: Path) -> Path:
    path = folder / "shards"
    path.mkdir()
    for number in range(2_000):
        (path / f"model-{number:05}-of-99999.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return path


@hostile("npz", "an array that lies about its size", codes=(2,))
def lying_size(folder: Path) -> Path:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(100, dtype=np.float32))
    return npz(folder, layer(buffer.getvalue()[:200]))
