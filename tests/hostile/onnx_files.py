"""ONNX models that cost more than their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.hostile.case import hostile
from tests.hostile.pickles import MANY, READ_OR_REFUSED
from tests.hostile.protobuf import (
    INT64,
    attribute,
    field,
    floats,
    function,
    graph,
    integers,
    model,
    node,
    number,
    tensor,
    value_info,
)

BOTH = ("check {}", "fold {} --output {dir}/out.onnx")
NAMES = ("w", "b", "m", "v")
onnx = partial(hostile, "onnx", codes=READ_OR_REFUSED, needs="onnx")


def batch_norm(output: str = "y", parameters: Sequence[str] = NAMES, source: str = "x") -> bytes:
    """Encode a BN node."""
    return node("BatchNormalization", [source, *parameters], [output], name=output)


def four(dims: Sequence[int] = (1,), data: bytes | None = None) -> list[bytes]:
    """Encode the parameters of a BN node."""
    return [tensor(name, dims, floats(1.0) if data is None else data) for name in NAMES]


def honest(folder: Path) -> Path:
    """Write a model with a BN node, which is nothing but honest."""
    inputs = [value_info("x", [1, 1, 2, 2])]
    return model(folder, graph([batch_norm()], four(), inputs=inputs, outputs=[value_info("y", [1, 1, 2, 2])]))


def branch(body: bytes) -> bytes:
    """Encode an If node with one branch."""
    return node("If", ["c"], ["i"], attribute("then_branch", body, "graph"))


@onnx("8k sibling subgraphs", *BOTH)
def siblings(folder: Path) -> Path:
    constants = [tensor(f"t{n}", [1], floats(1.0)) for n in range(8_000)]
    inner = graph([batch_norm()])
    return model(folder, graph([branch(inner) for _ in range(8_000)], [*four(), *constants]))


@onnx("8k nested subgraphs", *BOTH)
def nested(folder: Path) -> Path:
    body = graph([batch_norm()], four())
    for _ in range(8_000):
        body = graph([branch(body)])
    return model(folder, body)


@onnx("30 nested subgraphs with 3k constants each", *BOTH)
def nested_constants(folder: Path) -> Path:
    constants = [tensor(f"t{n}", [1], floats(1.0)) for n in range(3_000)]
    body = graph([batch_norm()], four())
    for _ in range(30):
        body = graph([branch(body), *([branch(graph([batch_norm()]))] * 200)], constants)
    return model(folder, body)


@onnx("2**60 calls of 60 functions", *BOTH)
def laughing_functions(folder: Path) -> Path:
    call = partial(node, domain="local")
    functions = [function("f0", ["x", *NAMES], ["y"], [batch_norm()])]
    for level in range(1, 61):
        nodes = [call(f"f{level - 1}", ["x", *NAMES], ["h"]), call(f"f{level - 1}", ["h", *NAMES], ["y"])]
        functions.append(function(f"f{level}", ["x", *NAMES], ["y"], nodes))
    return model(folder, graph([call("f60", ["x", *NAMES], ["y"])], four()), functions)


@onnx("a function that calls itself", *BOTH)
def recursive_function(folder: Path) -> Path:
    itself = function("f", ["x", *NAMES], ["y"], [node("f", ["x", *NAMES], ["h"], domain="local"), batch_norm()])
    return model(folder, graph([node("f", ["x", *NAMES], ["y"], domain="local")], four()), [itself])


@onnx("5k functions that call the next", *BOTH)
def chained_functions(folder: Path) -> Path:
    functions = [function("f0", ["x", *NAMES], ["y"], [batch_norm()])]
    calls = [node(f"f{level}", ["x", *NAMES], ["y"], domain="local") for level in range(4_999)]
    functions += [function(f"f{level}", ["x", *NAMES], ["y"], [call]) for level, call in enumerate(calls, 1)]
    return model(folder, graph([node("f4999", ["x", *NAMES], ["y"], domain="local")], four()), functions)


def external(folder: Path, location: str, **extra: str) -> Path:
    """Write a model whose parameters lie in another file."""
    constants = [tensor(name, [4], external={"location": location, **extra}) for name in NAMES]
    return model(folder, graph([batch_norm()], constants))


@onnx("an external length of 4 GB for 4 values", *BOTH)
def external_length(folder: Path) -> Path:
    with (folder / "data.bin").open("wb") as file:
        file.truncate(4_000_000_000)
    return external(folder, "data.bin", length="4000000000")


@onnx("external data of 4 GB without a length", *BOTH)
def external_whole(folder: Path) -> Path:
    with (folder / "data.bin").open("wb") as file:
        file.truncate(4_000_000_000)
    return external(folder, "data.bin")


@onnx("external data in a pipe", *BOTH, codes=(2,))
def external_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "data.bin")
    return external(folder, "data.bin")


@onnx("external data in a link to /dev/zero", *BOTH, codes=(2,))
def external_device(folder: Path) -> Path:
    (folder / "data.bin").symlink_to("/dev/zero")
    return external(folder, "data.bin")


@onnx("external data outside the folder", *BOTH, codes=(2,))
def external_outside(folder: Path) -> Path:
    return external(folder, "../../../../../../../dev/zero")


@onnx("external data at an absolute path", *BOTH, codes=(2,))
def external_absolute(folder: Path) -> Path:
    return external(folder, "/dev/zero")


@onnx("an external offset of 400 digits", *BOTH, codes=(2,))
def external_offset(folder: Path) -> Path:
    (folder / "data.bin").write_bytes(bytes(64))
    return external(folder, "data.bin", offset="9" * 400, length="-1")


@onnx("ConstantOfShape of 2**62 values", *BOTH)
def giant_constant(folder: Path) -> Path:
    shape = tensor("s", [2], integers(1 << 31, 1 << 31), kind=INT64)
    nodes = [node("ConstantOfShape", ["s"], [name]) for name in NAMES]
    return model(folder, graph([*nodes, batch_norm()], [shape]))


@onnx("2k layers share ConstantOfShape of 1M values", *BOTH)
def shared_constant(folder: Path) -> Path:
    shape = tensor("s", [1], integers(1 << 20), kind=INT64)
    nodes = [node("ConstantOfShape", ["s"], [name]) for name in NAMES]
    return model(folder, graph([*nodes, *(batch_norm(f"y{n}") for n in range(2_000))], [shape]))


@onnx("2k layers share an initializer of 1M values", *BOTH)
def shared_initializer(folder: Path) -> Path:
    return model(folder, graph([batch_norm(f"y{n}") for n in range(2_000)], four([1 << 20], bytes(4 << 20))))


@onnx("3k layers behind a chain of 20k Identity nodes", *BOTH)
def identities(folder: Path) -> Path:
    chain = [node("Identity", [f"i{n}"], [f"i{n + 1}"]) for n in range(MANY)]
    layers = [batch_norm(f"y{n}", [f"i{MANY}"] * 4) for n in range(3_000)]
    return model(folder, graph([*chain, *layers], [tensor("i0", [1], floats(1.0))]))


@onnx("Identity, Cast and Reshape nodes in a circle", *BOTH)
def circle(folder: Path) -> Path:
    nodes = [
        node("Identity", ["a"], ["b"]),
        node("Cast", ["b"], ["c"], attribute("to", 1)),
        node("Reshape", ["c", "a"], ["d"]),
        node("Identity", ["d"], ["a"]),
        node("ConstantOfShape", ["e"], ["e"]),
    ]
    return model(folder, graph([*nodes, batch_norm("y", ["a", "b", "c", "e"])]))


@onnx("2**60 paths through 60 Add nodes", *BOTH)
def laughing_sums(folder: Path) -> Path:
    nodes = [node("Add", [f"a{n}", f"a{n}"], [f"a{n + 1}"]) for n in range(60)]
    return model(folder, graph([*nodes, batch_norm("y", ["a60"] * 4)], [tensor("a0", [1], floats(1.0))]))


@onnx("100k Cast nodes in a row", *BOTH)
def casts(folder: Path) -> Path:
    nodes = [node("Cast", [f"a{n}"], [f"a{n + 1}"], attribute("to", 1)) for n in range(100_000)]
    return model(folder, graph([*nodes, batch_norm("y", ["a100000"] * 4)], [tensor("a0", [1], floats(1.0))]))


@onnx("Expand, Tile and Reshape to 2**40 values", *BOTH)
def expanded(folder: Path) -> Path:
    shape = tensor("s", [1], integers(1 << 40), kind=INT64)
    nodes = [node(kind, ["one", "s"], [name]) for kind, name in zip(("Expand", "Tile", "Reshape"), NAMES, strict=False)]
    return model(
        folder, graph([*nodes, batch_norm()], [shape, tensor("one", [1], floats(1.0)), tensor("v", [1], floats(1.0))])
    )


@onnx("sparse initializers of 2**40 values", *BOTH)
def sparse_initializers(folder: Path) -> Path:
    constants = []
    for name in NAMES:
        parts = [field(1, tensor(name, [1], floats(1.0))), field(2, tensor("", [1], integers(7), kind=INT64))]
        constants.append(b"".join([*parts, number(3, 1 << 40)]))
    return model(folder, graph([batch_norm()], sparse=constants))


@onnx("dimensions of 2**62, minus 1, and 600k of them", *BOTH)
def odd_dims(folder: Path) -> Path:
    dims = ([1 << 62] * 4, [-1], [1] * 600_000, [(1 << 62) - 1] * 100_000)
    constants = [tensor(name, sides, floats(1.0)) for name, sides in zip(NAMES, dims, strict=True)]
    return model(folder, graph([batch_norm()], constants))


@onnx("a BN node with 1M inputs", *BOTH)
def many_inputs(folder: Path) -> Path:
    return model(folder, graph([batch_norm("y", [*NAMES, *["x"] * 1_000_000])], four()))


@onnx("500k nodes without a name", *BOTH)
def many_nodes(folder: Path) -> Path:
    return model(folder, graph([*([node("Relu", ["x"], ["x"])] * 500_000), batch_norm()], four()))


@onnx("names with control characters", *BOTH)
def control_characters(folder: Path) -> Path:
    names = [f"\x1b[2J\r\n\0\u202e/{name}" for name in NAMES]
    return model(folder, graph([batch_norm("\x1b[31m\n", names)], [tensor(name, [1], floats(1.0)) for name in names]))


@onnx("a length of 2**63 in the first field", codes=(2,))
def giant_field(folder: Path) -> Path:
    path = folder / "hostile.onnx"
    path.write_bytes(number(1, 8) + b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
    return path


@onnx("a sparse file of 2 GB", codes=(2,))
def sparse_model(folder: Path) -> Path:
    path = folder / "hostile.onnx"
    with path.open("wb") as file:
        file.write(number(1, 8) + field(2, "a"))
        file.truncate(2_000_000_000)
    return path


@onnx("a text of 1.5 GB that is a hole", codes=(2,))
def sparse_text(folder: Path) -> Path:
    path = folder / "hostile.onnx"
    with path.open("wb") as file:
        file.write(number(1, 8) + b"\x32" + b"\x80\xde\xa0\xcb\x05")
        file.truncate(1_500_000_000 + 8)
    return path
