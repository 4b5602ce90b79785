"""The graph, a subgraph or a function of an ONNX model, as nodes that can be exchanged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import DamagedFile
from bnlab.observe.files.onnx_file import Constants, subgraphs

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto

__all__ = ["Scope", "all_scopes", "is_standard", "overridable", "version_of"]

_FIRST_IR_WITHOUT_LISTED_INITIALIZERS = 4
_MOST_VALUES = 1 << 28


def is_standard(node: NodeProto, *kinds: str) -> bool:
    """Whether a node is one of these operators of ONNX itself, not of another domain."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def version_of(opsets: Iterable[OperatorSetIdProto]) -> int:
    """Return the version of ONNX's own operators among the opset imports; 1 where there is none."""
    return max((int(opset.version) for opset in opsets if opset.domain in ("", "ai.onnx")), default=1)


def overridable(model: ModelProto) -> set[str]:
    """Return the initializers a caller may replace when the model runs, so that they are no constants.

    Before IR version 4 every initializer had to be a graph input as well, and exporters went on to write all of them
    so: that says nothing. Where only some of them are graph inputs, these were made so on purpose.
    """
    listed = {value.name for value in model.graph.input}
    initializers = {tensor.name for tensor in model.graph.initializer}
    if model.ir_version < _FIRST_IR_WITHOUT_LISTED_INITIALIZERS or initializers <= listed:
        return set()
    return initializers & listed


def all_scopes(model: ModelProto, types: ModelProto, path: Path) -> list[Scope]:
    """Return the graph, the functions and the subgraphs in them, each before those it holds.

    Args:
        model: The model; its scopes are changed by :meth:`Scope.commit`, inner ones first.
        types: The same model with the types that shape inference found.
        path: Where it was read from.
    """
    taken = {name for scope, _ in _protos(model) for name in _names(scope)}
    needs_listing = model.ir_version < _FIRST_IR_WITHOUT_LISTED_INITIALIZERS
    found = []
    for (proto, opset), (typed, _) in zip(_protos(model), _protos(types), strict=True):
        is_main = proto is model.graph
        scope = Scope(proto, opset, path, taken, overridable(model) if is_main else set(), _types(typed))
        scope.is_main, scope.lists_initializers = is_main, is_main and needs_listing
        found.append(scope)
    return found


class Scope:
    """One graph, subgraph or function, changed in memory until :meth:`commit`.

    Attributes:
        proto: The GraphProto or FunctionProto.
        opset: Version of ONNX's own operators in it.
        nodes: Its nodes, in order.
        outputs: Names of its outputs.
        types: Types of tensors by name, as far as they are known.
        is_main: Whether it is the outer graph.
        lists_initializers: Whether an initializer must be a graph input too.
    """

    def __init__(
        self,
        proto: GraphProto | FunctionProto,
        opset: int,
        path: Path,
        taken: set[str],
        fed: AbstractSet[str],
        types: Mapping[str, TypeProto],
    ) -> None:
        self.proto = proto
        self.opset = opset
        self.nodes: list[NodeProto] = list(proto.node)
        self.is_function = not hasattr(proto, "initializer")
        self.outputs = {getattr(output, "name", output) for output in proto.output}
        self.types = types
        self.is_main = False
        self.lists_initializers = False
        self._inputs = {getattr(value, "name", value) for value in proto.input}
        self._constants = Constants(proto, path.parent, limit=_MOST_VALUES)
        self._path = path
        self._taken = taken
        self._fed = fed
        self._makers: dict[str, NodeProto] = {}
        self._users: dict[str, list[NodeProto]] = {}
        self._unneeded: list[str] = []
        self._vanished: set[str] = set()
        self._new: dict[str, NDArray[Any]] = {}
        self._changed = False
        for node in self.nodes:
            self._register(node)

    def maker(self, name: str) -> NodeProto | None:
        """Return the node of this scope that makes a tensor."""
        return self._makers.get(name)

    def users(self, name: str) -> Sequence[NodeProto]:
        """Return the nodes that use a tensor, themselves or in a subgraph, as often as they use it."""
        return self._users.get(name, ())

    def owns(self, name: str) -> bool:
        """Whether a tensor is made in or handed to this very scope, not taken from one around it."""
        return name in self._makers or name in self._inputs or name in self._constants.tensors

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor, where it is known."""
        tensor = self.types[name].tensor_type if name in self.types else None
        return len(tensor.shape.dim) if tensor is not None and tensor.HasField("shape") else None

    def element_type(self, name: str) -> int | None:
        """Return the ONNX data type of a tensor, where it is known."""
        return self.types[name].tensor_type.elem_type or None if name in self.types else None

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the values of a tensor that never change, or None where they are computed, fed or from outside.

        Raises:
            DamagedFile: If the tensor does not hold as many values as it says.
        """
        if self._constants.root(name) in self._fed:
            return None
        try:
            found = self._constants.find(name)
        except (ValueError, TypeError, KeyError):  # KeyError: a data type nobody knows
            raise DamagedFile(f"{self._path}: tensor {name!r} must hold the values it promises, got others.") from None
        return None if found is None else found[1]

    def why_no_constant(self, name: str) -> str:
        """Say why :meth:`constant` returns None."""
        if self._constants.root(name) in self._fed:
            return f"{name!r} is a graph input with a default, which a caller may replace"
        if not self.owns(name):
            return f"{name!r} lies outside the subgraph"
        return f"{name!r} is computed or fed when the model runs"

    def is_own_initializer(self, name: str) -> bool:
        """Whether a tensor is an initializer that one node alone uses, so that it can be overwritten."""
        return name in self._constants.tensors and len(self.users(name)) == 1 and name not in self.outputs

    def unique(self, name: str) -> str:
        """Return a name that nothing in the model has yet, as close to `name` as possible."""
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        free = next(candidate for candidate in candidates if candidate not in self._taken)
        self._taken.add(free)
        return free

    def swap(
        self, gone: Sequence[NodeProto], new: Sequence[NodeProto], at: NodeProto, values: Mapping[str, NDArray[Any]]
    ) -> None:
        """Put nodes and the constants they need in the place of others.

        Args:
            gone: Nodes that go.
            new: Nodes that come, in order.
            at: The one of `gone` in whose place they come.
            values: Their constants by name; an initializer that is there already is overwritten.
        """
        for node in gone:
            self._unregister(node)
        coming = [*(node for name, value in values.items() if (node := self._store(name, value)) is not None), *new]
        for node in coming:
            self._register(node)
        kept: list[NodeProto] = []
        for node in self.nodes:
            kept += coming if node is at else []
            if not any(node is other for other in gone):
                kept.append(node)
        self.nodes = kept
        self._changed = True

    def commit(self) -> None:
        """Write everything into the model, without what the changes made superfluous."""
        if not self._changed:
            return
        dropped = self._sweep()
        del self.proto.node[:]
        self.proto.node.extend(self.nodes)
        if self.is_function:
            return
        for field in (self.proto.initializer, self.proto.input):
            _remove(field, dropped)
        _remove(self.proto.value_info, {name for name in self._vanished if name not in self._makers} | dropped)
        self._add_initializers()

    def _store(self, name: str, value: NDArray[Any]) -> NodeProto | None:
        """Keep a constant; return the node that holds it where it is not an initializer."""
        from onnx import helper, numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self.is_function:
            node = helper.make_node("Constant", [], [name], value=tensor)
            self._constants.nodes[name] = node
            return node
        if name in self._constants.tensors and name not in self._new:
            self._constants.tensors[name].CopyFrom(tensor)
        else:
            self._constants.tensors[name] = tensor
            self._new[name] = value
        return None

    def _add_initializers(self) -> None:
        from onnx import helper

        for name, value in self._new.items():
            if self.users(name):
                self.proto.initializer.append(self._constants.tensors[name])
                if self.lists_initializers:
                    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                    self.proto.input.append(helper.make_tensor_value_info(name, kind, value.shape))

    def _sweep(self) -> set[str]:
        """Take out the constants that nothing uses any more since a node went; return the names of initializers."""
        dropped = set()
        while self._unneeded:
            name = self._unneeded.pop()
            if not name or self.users(name) or name in self.outputs:
                continue
            if name in self._constants.tensors:
                dropped.add(name)
            elif name in self._constants.nodes and name in self._makers:
                node = self._makers[name]
                self._unregister(node)
                self.nodes = [other for other in self.nodes if other is not node]
        return dropped

    def _register(self, node: NodeProto) -> None:
        for name in node.output:
            self._makers[name] = node
        for name in _used(node):
            self._users.setdefault(name, []).append(node)

    def _unregister(self, node: NodeProto) -> None:
        for name in node.output:
            self._makers.pop(name, None)
            self._vanished.add(name)
        for name in _used(node):
            self._users[name] = [other for other in self._users[name] if other is not node]
            self._unneeded.append(name)


def _protos(model: ModelProto) -> Iterator[tuple[Any, int]]:
    pending = [(model.graph, version_of(model.opset_import))]
    pending += [(function, version_of(function.opset_import)) for function in model.functions]
    while pending:
        proto, opset = pending.pop(0)
        yield proto, opset
        pending += [(graph, opset) for node in proto.node for graph in subgraphs(node)]


def _used(node: NodeProto) -> list[str]:
    """Return the names a node uses, those in its subgraphs included: a name there may come from here."""
    used = [name for name in node.input if name]
    for graph in subgraphs(node):
        used += [output.name for output in graph.output]
        for inner in graph.node:
            used += _used(inner)
    return used


def _names(proto: GraphProto) -> Iterator[str]:
    for value in (*proto.input, *proto.output, *getattr(proto, "initializer", ())):
        yield getattr(value, "name", value)
    for node in proto.node:
        yield node.name
        yield from node.input
        yield from node.output


def _types(proto: GraphProto | FunctionProto) -> dict[str, TypeProto]:
    values = [*proto.value_info] if hasattr(proto, "value_info") else []
    if hasattr(proto, "initializer"):
        values += [*proto.input, *proto.output]
    return {value.name: value.type for value in values if value.type.HasField("tensor_type")}


def _remove(field: MutableSequence[Any], names: AbstractSet[str]) -> None:
    for index in reversed([index for index, value in enumerate(field) if value.name in names]):
        del field[index]
