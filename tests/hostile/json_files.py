"""Safetensors headers and JSON indices that cost more than their bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.hostile.case import hostile
from tests.hostile.opcodes import KEYS
from tests.hostile.pickles import MANY, READ_OR_REFUSED


def safetensors(folder: Path, header: bytes | dict[str, Any], data: bytes = b"\0\0\x80?") -> Path:
    """Write a safetensors file."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    """Describe a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def four(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Describe a BN layer."""
    return {f"{name}.{key}": value for key in KEYS}


@hostile("safetensors", "a shape of 600k dimensions", codes=READ_OR_REFUSED)
def high_rank(folder: Path) -> Path:
    return safetensors(folder, four("bn", entry(0, 4, *[1] * 600_000)))


@hostile("safetensors", "running_mean of 600k dimensions, 8 layers", codes=READ_OR_REFUSED)
def many_high_ranks(folder: Path) -> Path:
    header: dict[str, Any] = {}
    for number in range(8):
        header[f"bn{number}.running_mean"] = entry(4 * number, 4 * number + 4, *[1] * 600_000)
    return safetensors(folder, header, bytes(32))


@hostile("safetensors", "a counter of 40k dimensions", codes=READ_OR_REFUSED)
def counter_of_high_rank(folder: Path) -> Path:
    layer = {f"bn.{key}": entry(4 * at, 4 * at + 4, 1) for at, key in enumerate(KEYS)}
    layer["bn.num_batches_tracked"] = entry(16, 24, *[1] * 40_000, dtype="I64")
    return safetensors(folder, layer, bytes(24))


@hostile("safetensors", "600 dimensions of 4,000 digits")
def long_numbers(folder: Path) -> Path:
    number = "9" * 4_000
    header = f'{{"bn.running_mean":{{"dtype":"F32","shape":[{",".join([number] * 1_000)}],"data_offsets":[0,4]}}}}'
    return safetensors(folder, header.encode())


@hostile("safetensors", "a number of 5,000 digits")
def too_long_number(folder: Path) -> Path:
    header = f'{{"bn.running_mean":{{"dtype":"F32","shape":[1],"data_offsets":[0,{"9" * 5_000}]}}}}'
    return safetensors(folder, header.encode())


@hostile("safetensors", "1M nested lists")
def nested_lists(folder: Path) -> Path:
    return safetensors(folder, b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}")


@hostile("safetensors", "a header of 90 MB of spaces and one emoji")
def large_header(folder: Path) -> Path:
    return safetensors(folder, b'{"' + "\U0001f600".encode() + b'":' + b" " * 90_000_000 + b"0}")


@hostile("safetensors", "a header of 100 MB in a file of 1 kB")
def cut_header(folder: Path) -> Path:
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{" + b" " * 1_000)
    return path


@hostile("safetensors", "a header of 2**63 bytes")
def giant_header(folder: Path) -> Path:
    path = folder / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    return path


@hostile("safetensors", "600k empty tensors", codes=READ_OR_REFUSED)
def many_tensors(folder: Path) -> Path:
    one = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return safetensors(folder, b"{" + b",".join(b'"t%d":%s' % (n, one) for n in range(600_000)) + b"}", b"")


@hostile("safetensors", "20k layers without affine", codes=READ_OR_REFUSED)
def without_affine(folder: Path) -> Path:
    keys = [f"bn{n}.{key}" for n in range(MANY) for key in KEYS[2:]]
    return safetensors(folder, {key: entry(4 * n, 4 * n + 4, 1) for n, key in enumerate(keys)}, bytes(4 * len(keys)))


@hostile("safetensors", "20k layers over the same 4 MB")
def overlapping(folder: Path) -> Path:
    header: dict[str, Any] = {}
    for number in range(MANY):
        header |= four(f"bn{number}", entry(0, 4 << 20, 1 << 20))
    return safetensors(folder, header, bytes(4 << 20))


@hostile("safetensors", "metadata of 50 MB", codes=READ_OR_REFUSED)
def large_metadata(folder: Path) -> Path:
    layer = {f"bn.{key}": entry(4 * at, 4 * at + 4, 1) for at, key in enumerate(KEYS)}
    return safetensors(folder, {"__metadata__": {"a": "b" * 50_000_000}, **layer}, bytes(16))


@hostile("safetensors", "nan, infinity and 1e999 as offsets")
def odd_numbers(folder: Path) -> Path:
    return safetensors(folder, b'{"bn.running_mean":{"dtype":"F32","shape":[NaN],"data_offsets":[1e999,-Infinity]}}')


@hostile("safetensors", "names with control characters", codes=READ_OR_REFUSED)
def control_characters(folder: Path) -> Path:
    names = [f"\x1b[2J\r\n\0\u202e.{key}" for key in KEYS]
    return safetensors(folder, {name: entry(4 * at, 4 * at + 4, 1) for at, name in enumerate(names)}, bytes(16))


def index(folder: Path, weights: dict[str, Any] | bytes) -> Path:
    """Write the index of a network over several files."""
    path = folder / "model.safetensors.index.json"
    encoded = weights if isinstance(weights, bytes) else json.dumps({"metadata": {}, "weight_map": weights}).encode()
    path.write_bytes(encoded)
    return path


@hostile("json index", "1M shards")
def many_shards(folder: Path) -> Path:
    return index(folder, {f"bn{n}.running_mean": f"model-{n}.safetensors" for n in range(1_000_000)})


@hostile("json index", "1M tensors in one missing shard")
def missing_shard(folder: Path) -> Path:
    return index(folder, {f"bn{n}.running_mean": "model-1.safetensors" for n in range(1_000_000)})


@hostile("json index", "shards outside the folder")
def outside(folder: Path) -> Path:
    return index(folder, {"bn.running_mean": "../../../../../../dev/zero", "bn.running_var": "/dev/zero"})


@hostile("json index", "itself as a shard")
def itself(folder: Path) -> Path:
    return index(folder, {f"bn.{key}": "model.safetensors.index.json" for key in KEYS})


@hostile("json index", "1M nested lists")
def nested_index(folder: Path) -> Path:
    return index(folder, b"[" * 1_000_000)


@hostile("json index", "a number of 400 digits, and no map")
def long_number_in_index(folder: Path) -> Path:
    return index(folder, b'{"metadata":{"total_size":' + b"9" * 400 + b'},"weight_map":7}')


@hostile("json record", "numbers of 400 digits in a saved diagnosis", "report {}")
def long_number_in_record(folder: Path) -> Path:
    path = folder / "record.json"
    path.write_bytes(
        b'{"schema":"bnlab.diagnosis/1","bnlab":' + b"9" * 400 + b',"summary":{"layers":' + b"9" * 400 + b"}}"
    )
    return path


@hostile("json record", "1M nested lists in a saved diagnosis", "report {}")
def nested_record(folder: Path) -> Path:
    path = folder / "record.json"
    path.write_bytes(b'{"schema":"bnlab.diagnosis/1","layers":' + b"[" * 1_000_000)
    return path


@hostile("json record", "a saved diagnosis of 400 MB of spaces", "report {}")
def large_record(folder: Path) -> Path:
    path = folder / "record.json"
    with path.open("wb") as file:
        file.write(b'{"schema":"bnlab.diagnosis/1"}')
        file.truncate(400_000_000)
    return path
