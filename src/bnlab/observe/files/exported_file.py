"""Reads the programs of ``torch.export.save`` as data: their tensors, and the BN operators in their graphs.

Since torch 2.7 a ``.pt2`` is an archive with ``models/NAME.json`` and ``data/weights``; before, it holds
``serialized_exported_program.json`` and ``serialized_state_dict.pt``. The JSON is the same in both. It names the
tensor behind each argument of an operator, and holds eps, momentum and the mode as numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.pickle_data import Data
from bnlab.observe.files.pickled_module import ModuleTree, StoredModule, is_plausible, objection_to_instance_norm
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor, strided
from bnlab.observe.files.zip_archive import Archive, read_archive
from bnlab.observe.files.zipped_pickle import is_big_endian, pickle_root, read_zipped_pickle
from bnlab.observe.graph_state import NodeMode

__all__ = ["exported_root", "read_exported"]

_FORMAT = "archive_format"
_OLD_PROGRAM = "serialized_exported_program.json"
_OLD_STATES = ("serialized_state_dict.pt", "serialized_constants.pt")
_LARGEST_JSON = 64 << 20
_BYTES_OF_VALUE = 24
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
}
"""The numbers of dtypes in the schema of torch.export."""
_ALWAYS_STORED = ("no_training", "no_update")
_ALWAYS_BATCH = ("with_update", "no_stats")
_INT64 = 1 << 63


def exported_root(archive: Archive) -> str | None:
    """Return the folder of a program in an archive of ``torch.export``, with its slash; None for other archives."""
    for name in archive.members:
        base = name.rpartition("/")[2]
        if base in (_FORMAT, _OLD_PROGRAM):
            return name.removesuffix(base)
    return None


def read_exported(archive: Archive, root: str) -> Data:
    """Read the programs of an archive down to their tensors, which stay unread.

    Returns:
        The program, or a dict of several by their names.

    Raises:
        NotACheckpoint: If the archive holds compiled code alone.
        ValueError: If it is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    if f"{root}{_OLD_PROGRAM}" in archive:
        states = [_torch_file(archive, f"{root}{name}") for name in _OLD_STATES if f"{root}{name}" in archive]
        return _program(_json(archive, f"{root}{_OLD_PROGRAM}"), states)
    folder = f"{root}models/"
    files = [name for name in archive.members if name.startswith(folder) and name.endswith(".json")]
    if not files:
        raise NotACheckpoint(
            "file must hold tensors, got a package of AOTInductor, whose numbers are part of its compiled code. "
            "Check the model or the program from which it was compiled."
        )
    programs = {}
    for file in files:
        name = file.removeprefix(folder).removesuffix(".json")
        states = [_state(archive, root, kind, name) for kind in ("weights", "constants")]
        programs[name] = _program(_json(archive, file), states)
    return programs if len(programs) > 1 else next(iter(programs.values()))


def _state(archive: Archive, root: str, kind: str, name: str) -> Mapping[Any, Any]:
    """Return the weights or constants of a program by their names."""
    folder = f"{root}data/{kind}/"
    for base in (f"{name}_{kind}_config.json", f"{name}_model_{kind}_config.json"):
        if f"{folder}{base}" in archive:
            entries = _json(archive, f"{folder}{base}")["config"]
            big_endian = is_big_endian(archive, root)
            tensors = {key: _tensor(archive, folder, entry, big_endian) for key, entry in entries.items()}
            return {key: value for key, value in tensors.items() if value is not None}
    whole = f"{folder}{name}.pt"  # torch 2.7 and 2.8
    state = _torch_file(archive, whole) if whole in archive else {}
    return state if isinstance(state, dict) else {}


def _tensor(archive: Archive, folder: str, entry: Any, big_endian: bool) -> Any:  # noqa: ANN401 - JSON
    """Return one tensor, whose storage is a member of its own."""
    member, meta = f"{folder}{entry['path_name']}", entry["tensor_meta"]
    if entry.get("use_pickle") or meta is None:
        return _torch_file(archive, member) if member in archive else None
    dtype = _DTYPES.get(meta["dtype"])
    shape, strides = ([_size(size) for size in meta[key]] for key in ("sizes", "strides"))
    if dtype is None or len(shape) > MAX_RANK:
        return None
    archive.content.budget.spend("tensors")
    offset = _size(meta["storage_offset"])
    place = partial(archive.span, member)
    bits = partial(_bits, place, dtype, tuple(shape), tuple(strides), offset, big_endian)
    return StoredTensor(dtype, tuple(shape), bits)


def _bits(place: Any, dtype: str, shape: Any, strides: Any, offset: int, big_endian: bool) -> Any:  # noqa: ANN401
    return strided(place(), dtype, shape, strides=strides, offset=offset, big_endian=big_endian)


def _size(value: Any) -> int:  # noqa: ANN401 - JSON
    size = value["as_int"]
    if type(size) is not int or not 0 <= size < _INT64:
        raise ValueError("its JSON has an impossible size")
    return size


def _torch_file(archive: Archive, name: str) -> Data:
    """Read a file of ``torch.save`` that is a member of an archive."""
    span = archive.span(name)
    if span.size == 0:
        return {}
    if span.source is not archive.content:
        raise ValueError(f"{name.rpartition('/')[2]} is compressed, which torch never does")
    inner = read_archive(archive.content.part(span.start, span.size))
    root = pickle_root(inner)
    if root is None:
        raise ValueError(f"{name.rpartition('/')[2]} is not a file of torch.save")
    return read_zipped_pickle(inner, root)


def _json(archive: Archive, name: str) -> Any:  # noqa: ANN401 - JSON
    """Read a JSON member, and refuse one that would become very large in memory."""
    text = archive.read(name, _LARGEST_JSON)
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    archive.content.budget.spend("bytes of text and numbers", len(text) + values * _BYTES_OF_VALUE)
    return json.loads(text)


def _program(document: Any, states: list[Mapping[Any, Any]]) -> ModuleTree:  # noqa: ANN401 - JSON
    """Return the tensors of a program, with what its BN operators say."""
    tree = ModuleTree("torch.export.ExportedProgram", is_program=True)
    for state in states:
        tree.tensors.update(state)
    graph = document["graph_module"]
    names = dict(_stored_names(graph["signature"]["input_specs"]))
    nodes = graph["graph"]["nodes"]
    for node in nodes:
        target = str(node["target"])
        if "batch_norm" in target or "instance_norm" in target:
            _add(tree, _Operator.of(node, target, names))
    return tree


def _stored_names(specs: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - JSON
    """Yield the name of each input of a graph with the name of the tensor that it stands for."""
    for spec in specs:
        for kind in ("parameter", "buffer", "tensor_constant"):
            if kind in spec:
                yield spec[kind]["arg"]["name"], spec[kind][f"{kind}_name"]


@dataclass(frozen=True)
class _Operator:
    """A normalization operator of a graph.

    Attributes:
        target: Its name.
        path: The path and the class of the module that called it.
        statistics: The names of the tensors of running_mean and running_var; None where there is none.
        numbers: Its arguments that are numbers or booleans.
    """

    target: str
    path: tuple[str, str]
    statistics: tuple[str | None, str | None]
    numbers: Mapping[str, Any]

    @classmethod
    def of(cls, node: Any, target: str, names: Mapping[str, str]) -> _Operator:  # noqa: ANN401 - JSON
        arguments = {entry["name"]: entry["arg"] for entry in node["inputs"]}
        tensors = {key: arg["as_tensor"]["name"] for key, arg in arguments.items() if "as_tensor" in arg}
        mean, var = (names.get(tensors.get(key, "")) for key in ("running_mean", "running_var"))
        numbers = {key: next(iter(arg.values()), None) for key, arg in arguments.items() if len(arg) == 1}
        stack = (node.get("metadata") or {}).get("nn_module_stack") or ""
        path, _, kind = stack.rpartition(";")[2].partition(",")[2].partition(",")
        return cls(target, (path or str(node.get("name") or target), kind or target), (mean, var), numbers)

    @property
    def mode(self) -> NodeMode | None:
        """Which statistics it uses."""
        if any(word in self.target for word in _ALWAYS_STORED):
            return NodeMode("training", 0, 0)
        if any(word in self.target for word in _ALWAYS_BATCH):
            return NodeMode("training", 1, 0)
        training = self.numbers.get("training")
        return NodeMode("training", int(training), 0) if isinstance(training, bool) else None

    @property
    def stated(self) -> dict[str, float | None]:
        """Eps and momentum. A cumulative average appears as a momentum of 0 in eval mode, because it has none."""
        eps = self.numbers.get("eps", self.numbers.get("epsilon"))
        momentum = self.numbers.get("momentum", self.numbers.get("exponential_average_factor"))
        stated = {"eps": eps, "momentum": momentum or None}
        return {name: value for name, value in stated.items() if value is not None and is_plausible(name, value)}


def _add(tree: ModuleTree, operator: _Operator) -> None:
    """Add what an operator says about the layer whose statistics it reads."""
    path, kind = operator.path
    mean, var = operator.statistics
    mode, stated = operator.mode, operator.stated
    if "instance_norm" in operator.target:
        if mean is not None:
            tree.layers[_owner(mean)] = StoredModule(kind, None, True, stated, objection_to_instance_norm(kind))
    elif mean is None or var is None:
        tree.layers.setdefault(path, StoredModule(kind, None, False, stated, None, mode))
    else:
        training = None if mode is None else mode.uses_batch
        tree.layers.setdefault(_owner(mean), StoredModule(kind, training, True, stated, None, mode))


def _owner(name: str) -> str:
    """Return the path of the module that has a tensor."""
    return name.rpartition(".")[0]
