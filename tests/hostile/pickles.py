"""Pickles that cost more than their bytes."""

from __future__ import annotations

import pickle
import random
import struct
from itertools import chain
from pathlib import Path

from tests.hostile.case import CODE, hostile
from tests.hostile.opcodes import (
    END,
    LEGACY_HEADER,
    START,
    dictionary,
    get,
    layer,
    named,
    put,
    reduced,
    stored,
    tensor,
    text,
    tuple_of,
    zipped,
)

MANY = 20_000
ONE = tensor("0", [1], [1])
READ_OR_REFUSED = (0, 1, 2)


def legacy(folder: Path, tree: bytes, after: bytes = b"") -> Path:
    """Write a file of torch.save before 1.6."""
    path = folder / "hostile.pt"
    path.write_bytes(LEGACY_HEADER + START + tree + END + after)
    return path


def alone(folder: Path, tree: bytes) -> Path:
    """Write a pickle by itself, as other houses do."""
    path = folder / "hostile.pkl"
    path.write_bytes(START + tree + END)
    return path


def times(count: int, value: bytes) -> bytes:
    """Push a list with the same value many times."""
    return b"](" + value * count + b"e"


def half_a_layer(tree: bytes) -> bytes:
    """Push a dict with a BN layer and something else, so that the file is of interest."""
    return dictionary(text("other"), tree, layer("bn", ONE))


SHARED_TUPLE = b"(" + b"N" * 200_000 + b"t" + put(1) + b"0"
FOREIGN = named("foreign", "Thing")


@hostile("pickle", "20k foreign objects share one tuple of 200k", codes=READ_OR_REFUSED)
def shared_arguments(folder: Path) -> Path:
    return zipped(folder, SHARED_TUPLE + half_a_layer(times(MANY, FOREIGN + get(1) + b"R")))


@hostile("pickle", "20k foreign objects share one state of 200k", codes=READ_OR_REFUSED)
def shared_state(folder: Path) -> Path:
    state = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(200_000)) + b"u" + put(1) + b"0"
    return zipped(folder, state + half_a_layer(times(MANY, FOREIGN + b")R" + get(1) + b"b")), level=9)


@hostile("pickle", "20k foreign objects share one tuple of 200k, legacy", codes=READ_OR_REFUSED)
def shared_arguments_legacy(folder: Path) -> Path:
    after = pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 1.0)
    return legacy(folder, SHARED_TUPLE + half_a_layer(times(MANY, FOREIGN + get(1) + b"R")), after)


@hostile("pickle", "20k foreign objects share one tuple of 200k, without torch", codes=READ_OR_REFUSED)
def shared_arguments_alone(folder: Path) -> Path:
    return alone(folder, SHARED_TUPLE + times(MANY, FOREIGN + get(1) + b"R"))


@hostile("pickle", "20k times OrderedDict of the same pairs")
def shared_pairs(folder: Path) -> Path:
    pairs = b"](" + b"".join(b"](" + text(f"{n:x}") + b"Ne" for n in range(30_000)) + b"e" + put(1) + b"0"
    return zipped(folder, pairs + times(MANY, named("collections", "OrderedDict") + get(1) + b"\x85R"), level=9)


@hostile("pickle", "20k times _codecs.encode of 1 MB")
def encoded(folder: Path) -> Path:
    value = text("a" * 900_000) + put(1) + b"0"
    return zipped(folder, value + times(MANY, named("_codecs", "encode") + get(1) + text("latin1") + b"\x86R"))


@hostile("pickle", "20k times bytearray of the same 1 MB", codes=READ_OR_REFUSED)
def byte_arrays(folder: Path) -> Path:
    value = text("a" * 900_000) + put(1) + b"0"
    call = named("builtins", "bytearray") + get(1) + text("latin-1") + b"\x86R"
    return zipped(folder, value + half_a_layer(times(MANY, call)))


@hostile("pickle", "300 expanded layers of 1M channels")
def expanded_layers(folder: Path) -> Path:
    wide = tensor("0", [1 << 20], [0]) + put(1) + b"0"
    return zipped(folder, wide + dictionary(*(layer(f"bn{n}", get(1)) for n in range(300))))


@hostile("pickle", "300 layers share 1M channels")
def shared_channels(folder: Path) -> Path:
    wide = tensor("0", [1 << 20], [1], count=1 << 20) + put(1) + b"0"
    tree = dictionary(*(layer(f"bn{n}", get(1)) for n in range(300)))
    return zipped(folder, wide + tree, data=bytes(4 << 20))


@hostile("pickle", "3k layers unpack the same 4 MB", codes=READ_OR_REFUSED)
def deflated_storage(folder: Path) -> Path:
    narrow = tensor("0", [4], [1], count=1 << 20) + put(1) + b"0"
    tree = dictionary(*(layer(f"bn{n}", get(1)) for n in range(3_000)))
    noise = random.Random(0).randbytes(50_000)
    return zipped(folder, narrow + tree, data=noise + bytes((4 << 20) - len(noise)))


@hostile("pickle", "30M opcodes in 400 kB")
def many_opcodes(folder: Path) -> Path:
    noise = random.Random(0).randbytes(180_000)
    return zipped(folder, b"".join(b"N0" * 83 + b"K" + noise[n : n + 1] + b"0" for n in range(180_000)) + b"N")


@hostile("pickle", "30M opcodes, legacy")
def many_opcodes_legacy(folder: Path) -> Path:
    return legacy(folder, b"N0" * 15_000_000 + b"N")


@hostile("pickle", "30M opcodes, without torch")
def many_opcodes_alone(folder: Path) -> Path:
    return alone(folder, b"N0" * 15_000_000 + b"N")


@hostile("pickle", "10M empty dicts in a list, legacy")
def many_objects(folder: Path) -> Path:
    return legacy(folder, b"](" + b"}" * 10_000_000 + b"e")


@hostile("pickle", "10M numbers in a dict, legacy")
def many_keys(folder: Path) -> Path:
    return legacy(folder, b"}(" + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(5_000_000)) + b"u")


@hostile("pickle", "5M strings, without torch")
def many_strings(folder: Path) -> Path:
    return alone(folder, b"](" + b"".join(b"U\x04" + n.to_bytes(4, "little") for n in range(5_000_000)) + b"e")


@hostile("pickle", "memo index 2**31 and 2**32-1", codes=READ_OR_REFUSED)
def memo_index(folder: Path) -> Path:
    tree = text("a") + put(1 << 31) + put((1 << 32) - 1) + b"0"
    return zipped(folder, tree + half_a_layer(get((1 << 32) - 1)))


@hostile("pickle", "memo index of 4,000 digits", codes=READ_OR_REFUSED)
def memo_index_in_text(folder: Path) -> Path:
    return zipped(folder, text("a") + b"p" + b"9" * 4000 + b"\n0" + half_a_layer(b"N"))


@hostile("pickle", "BINUNICODE8 of 2**62 bytes")
def giant_string(folder: Path) -> Path:
    return zipped(folder, b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc")


@hostile("pickle", "BINBYTES8 of 2**40 bytes, legacy")
def giant_bytes(folder: Path) -> Path:
    return legacy(folder, b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc")


@hostile("pickle", "LONG4 of 2**31-1 bytes")
def giant_number(folder: Path) -> Path:
    return zipped(folder, b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"abc")


@hostile("pickle", "numbers of 900 kB as shape, offset and counter")
def long_numbers(folder: Path) -> Path:
    number = b"\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000 + put(1) + b"0"
    function = named("torch._utils", "_rebuild_tensor_v2")
    bad = reduced(function, stored("0", 1), get(1), tuple_of(get(1)), tuple_of(get(1)), b"\x89", b"}")
    return zipped(folder, number + dictionary(*(layer(f"bn{n}", bad) for n in range(2_000))))


@hostile("pickle", "a decimal number of 1 MB")
def decimal_number(folder: Path) -> Path:
    return alone(folder, b"I" + b"7" * 1_000_000 + b"\n")


@hostile("pickle", "1M nested lists", codes=READ_OR_REFUSED)
def nested_lists(folder: Path) -> Path:
    return legacy(folder, b"]" * 1_000_000 + b"a" * 999_999)


@hostile("pickle", "1M nested tuples", codes=READ_OR_REFUSED)
def nested_tuples(folder: Path) -> Path:
    return legacy(folder, b")" + b"\x85" * 1_000_000)


@hostile("pickle", "500k nested dicts", codes=READ_OR_REFUSED)
def nested_dicts(folder: Path) -> Path:
    return legacy(folder, b"}K\x00" * 500_000 + b"N" + b"s" * 500_000)


@hostile("pickle", "300k nested foreign objects", codes=READ_OR_REFUSED)
def nested_foreign(folder: Path) -> Path:
    return legacy(folder, named("a", "b") + put(1) + b")R" + (get(1) + b")R\x94" + b"0") * 3 + b"\x85" * 300_000)


@hostile("pickle", "calls nested 200k deep", codes=READ_OR_REFUSED)
def nested_calls(folder: Path) -> Path:
    return legacy(folder, named("a", "b") * 200_000 + b")" + b"R\x85" * 200_000)


@hostile("pickle", "states nested 200k deep", codes=READ_OR_REFUSED)
def nested_states(folder: Path) -> Path:
    return legacy(folder, (named("a", "b") + b")R") * 200_000 + b"b" * 199_999)


@hostile("pickle", "2**100 paths through 100 tuples", codes=READ_OR_REFUSED)
def laughing_tuples(folder: Path) -> Path:
    return zipped(folder, half_a_layer(b")" + b"2\x86" * 100))


@hostile("pickle", "2**100 paths through 100 dicts to a layer", codes=READ_OR_REFUSED)
def laughing_dicts(folder: Path) -> Path:
    tree = dictionary(layer("bn", ONE))
    for level in range(100):
        tree += put(level) + b"0" + dictionary(text("a"), get(level), text("b"), get(level))
    return zipped(folder, tree)


@hostile("pickle", "2**100 paths through 100 lists in a dict key", codes=READ_OR_REFUSED)
def laughing_keys(folder: Path) -> Path:
    return zipped(folder, b"}" + b")" + b"2\x86" * 100 + b"Ns")


@hostile("pickle", "a list in itself", codes=READ_OR_REFUSED)
def cyclic_list(folder: Path) -> Path:
    return zipped(folder, half_a_layer(b"]" + put(1) + get(1) + b"a"))


@hostile("pickle", "a dict in itself 20k times", codes=READ_OR_REFUSED)
def cyclic_dict(folder: Path) -> Path:
    entries = chain.from_iterable((text(f"k{n}"), get(1)) for n in range(MANY))
    return zipped(folder, b"}" + put(1) + b"(" + b"".join(entries) + layer("bn", ONE) + b"u")


@hostile("pickle", "20k layers without affine", codes=READ_OR_REFUSED)
def without_affine(folder: Path) -> Path:
    layers = (layer(f"bn{n}", get(1), keys=("running_mean", "running_var")) for n in range(MANY))
    return legacy(folder, ONE + put(1) + b"0" + dictionary(*layers), pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 1))


@hostile("pickle", "100k halves of layers", codes=READ_OR_REFUSED)
def half_layers(folder: Path) -> Path:
    layers = (layer(f"bn{n}", get(1), keys=("running_mean",)) for n in range(100_000))
    return legacy(folder, ONE + put(1) + b"0" + dictionary(*layers), pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 1))


@hostile("pickle", "100k keys that end in running_mean, without torch", codes=READ_OR_REFUSED)
def tails(folder: Path) -> Path:
    return alone(folder, dictionary(*(text(f"x{n}.running_mean") + b"N" for n in range(100_000))))


@hostile("pickle", "a long key shared by 1,000 nested networks", codes=READ_OR_REFUSED)
def long_paths(folder: Path) -> Path:
    tree = text("k" * 100_000) + put(1) + b"0" + ONE + put(2) + b"0" + b"N"
    for _ in range(1_000):
        tree += put(3) + b"0" + dictionary(get(1), get(3), layer("bn", get(2)))
    return zipped(folder, tree)


@hostile("pickle", "names of 10 MB with control characters", codes=READ_OR_REFUSED)
def long_names(folder: Path) -> Path:
    name = "\x1b[2J\r\n\0\u202e" * 1_000_000
    return legacy(folder, dictionary(layer(name, ONE)), pickle.dumps(["0"], 2) + struct.pack("<qf", 1, 1))


@hostile("pickle", "a counter with 40k dimensions", codes=READ_OR_REFUSED)
def counter_of_high_rank(folder: Path) -> Path:
    counter = tensor("0", [1] * 40_000, [1] * 40_000)
    return zipped(folder, dictionary(layer("bn", ONE), text("bn.num_batches_tracked"), counter))


@hostile("pickle", "200 counters with 40k dimensions", codes=READ_OR_REFUSED)
def counters_of_high_rank(folder: Path) -> Path:
    counter = tensor("0", [1] * 40_000, [7] * 40_000) + put(1) + b"0"
    layers = (layer(f"bn{n}", ONE) + text(f"bn{n}.num_batches_tracked") + get(1) for n in range(200))
    return zipped(folder, counter + dictionary(*layers))


@hostile("pickle", "100 tensors with 60k large dimensions", codes=READ_OR_REFUSED)
def huge_product(folder: Path) -> Path:
    wide = tensor("0", [(1 << 62) - 1] * 60_000, [1] * 60_000) + put(1) + b"0"
    return zipped(folder, wide + dictionary(*(layer(f"bn{n}", get(1)) for n in range(100))))


@hostile("pickle", "legacy storages of 2**62 values")
def giant_storages(folder: Path) -> Path:
    tree = dictionary(layer("bn", tensor("0", [1], [1], count=1 << 62)))
    return legacy(folder, tree, pickle.dumps(["0"], 2) + struct.pack("<q", 1 << 62))


@hostile("pickle", "500k legacy storages of no size", codes=READ_OR_REFUSED)
def empty_storages(folder: Path) -> Path:
    keys = pickle.dumps(["0"] * 500_000, 2)
    return legacy(folder, dictionary(layer("bn", tensor("0", [0], [1]))), keys + bytes(4_000_000))


@hostile("pickle", "legacy storage keys of 1M marks")
def marks(folder: Path) -> Path:
    return legacy(folder, b"(" * 3_000_000 + b"1" * 2_999_999)


@hostile("pickle", "numpy arrays of 20k dimensions", codes=READ_OR_REFUSED)
def arrays_of_high_rank(folder: Path) -> Path:
    dtype = named("numpy", "dtype") + text("f4") + b"\x89\x88\x87R(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\x00tb" + put(1) + b"0"
    shape = b"(" + b"K\x01" * 20_000 + b"t" + put(2) + b"0" + b"U\x04\0\0\x80?" + put(3) + b"0"
    make = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85" + b"U\x01b\x87R"
    array = make + b"(K\x01" + get(2) + get(1) + b"\x88" + get(3) + b"tb"
    return alone(folder, dtype + shape + dictionary(*(layer(f"bn{n}", array) for n in range(200))))


MODULE = named("torch.nn.modules.container", "Sequential")


def module(children: bytes, buffers: bytes = b"}") -> bytes:
    """Push a pickled module."""
    state = (
        text("_parameters"),
        b"}",
        text("_buffers"),
        buffers,
        text("_modules"),
        children,
        text("training"),
        b"\x88",
    )
    return MODULE + b")\x81" + dictionary(*state) + b"b"


@hostile("pickle", "2**60 paths through 60 pickled modules", codes=READ_OR_REFUSED)
def laughing_modules(folder: Path) -> Path:
    buffers = dictionary(text("running_mean"), ONE, text("running_var"), ONE)
    tree = module(b"}", buffers)
    for level in range(60):
        tree += put(level) + b"0" + module(dictionary(text("a"), get(level), text("b"), get(level)))
    return zipped(folder, tree)


@hostile("pickle", "30k nested pickled modules", codes=READ_OR_REFUSED)
def nested_modules(folder: Path) -> Path:
    outer = put(0) + b"0" + module(dictionary(text("a"), get(0)))
    return legacy(folder, module(b"}") + outer * 30_000)


@hostile("pickle", "a pickled module in itself", codes=READ_OR_REFUSED)
def cyclic_module(folder: Path) -> Path:
    inner = dictionary(
        text("_parameters"), b"}", text("_buffers"), b"}", text("_modules"), b"}" + text("a") + get(0) + b"s"
    )
    return zipped(folder, MODULE + b")\x81" + put(0) + inner + b"b")


@hostile("pickle", "1,000 wide sets of 200k shared values", codes=READ_OR_REFUSED)
def shared_set(folder: Path) -> Path:
    calls = times(1_000, named("builtins", "set") + get(1) + b"\x85R")
    return zipped(folder, SHARED_TUPLE + half_a_layer(calls))


@hostile(
    "pickle",
    "a pickle of 300 MB, with a model",
    "check {} --model {dir}/code.py:build",
    "repair {} --model {dir}/code.py:build --data digits --output {dir}/out.pt",
)
def large_pickle(folder: Path) -> Path:
    (folder / "code.py").write_text(CODE)
    path = folder / "hostile.pt"
    with path.open("wb") as file:  # a sparse file: what is skipped takes no room on the disk
        file.write(LEGACY_HEADER + START + b"\x8e" + struct.pack("<Q", 300_000_000))
        file.seek(300_000_000, 1)
        file.write(END)
    return path


@hostile("pickle", "30M opcodes, with a model", "check {} --model {dir}/code.py:build")
def many_opcodes_with_model(folder: Path) -> Path:
    (folder / "code.py").write_text(CODE)
    return many_opcodes_legacy(folder)


@hostile("pickle", "bytes of 300 MB, without torch")
def large_bytes(folder: Path) -> Path:
    path = folder / "hostile.pkl"
    with path.open("wb") as file:
        file.write(START + b"\x8e" + struct.pack("<Q", 300_000_000))
        file.seek(300_000_000, 1)
        file.write(END)
    return path
