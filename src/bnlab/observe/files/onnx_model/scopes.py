"""Walks through the nodes of an ONNX model: those of its graph, of subgraphs, and of every call of a function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import TYPE_CHECKING

from bnlab.errors import TooMuchWork
from bnlab.observe.files.onnx_model.constants import Constants

if TYPE_CHECKING:
    from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto

__all__ = ["Scope", "nodes_in", "subgraphs", "version_of", "walk"]

_STANDARD = ("", "ai.onnx")
_WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_MAX_NODES = 1_500_000
_MAX_CALLS = 20_000
_MAX_KEY_BYTES = 4096
FunctionKey = tuple[str, str, str]


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs that a node holds, such as the branches of an If node."""
    graphs: list[GraphProto] = []
    for attribute in node.attribute:
        graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return graphs


def nodes_in(scope: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph or function, and those of the graphs that they hold."""
    for node in scope.node:
        yield node
        for graph in subgraphs(node) if node.attribute else ():
            yield from nodes_in(graph)


def version_of(opsets: Iterable[OperatorSetIdProto]) -> int:
    """Return the version of the standard operators in the opset imports, or 1 if it is missing."""
    return max((int(opset.version) for opset in opsets if opset.domain in _STANDARD), default=1)


class Scope:
    """A graph, a subgraph, or a function as one call sees it.

    Attributes:
        proto: The graph or function.
        constants: Its constants.
        opset: The version of the standard operators.
        names: The inputs of a function, with the names that the caller has for them.
        reduced: The tensors of which others are reductions, by name, as far as somebody has looked.
    """

    def __init__(
        self,
        proto: GraphProto | FunctionProto,
        constants: Constants,
        opset: int,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.proto = proto
        self.constants = constants
        self.opset = opset
        self.names = names or {}
        self.reduced: dict[str, frozenset[str]] = {}

    @cached_property
    def producers(self) -> Mapping[str, NodeProto]:
        """The nodes of this scope by the names of their outputs."""
        return {name: node for node in self.proto.node for name in node.output if name}

    @cached_property
    def consumers(self) -> Mapping[str, list[NodeProto]]:
        """The nodes of this scope by the names of their inputs."""
        by_input: dict[str, list[NodeProto]] = {}
        for node in self.proto.node:
            for name in node.input:
                by_input.setdefault(name, []).append(node)
        return by_input


def walk(model: ModelProto, constants: Constants, operators: AbstractSet[str]) -> Iterator[tuple[NodeProto, Scope]]:
    """Yield nodes of some operators with their scopes, in the order of the graph, and those inside a node after it.

    The nodes of a function are yielded once for each call that passes it other constants. Functions without a call
    follow at the end.

    Args:
        model: The model.
        constants: The constants of its graph.
        operators: The names of the operators.

    Raises:
        TooMuchWork: If there are more nodes or calls than any network has.
    """
    yield from _Walk(model, constants).nodes(operators)


class _Walk:
    def __init__(self, model: ModelProto, constants: Constants) -> None:
        self.model = model
        self.constants = constants
        self.functions: dict[FunctionKey, FunctionProto] = {
            (function.domain, function.name, function.overload): function for function in model.functions
        }
        self.calls: dict[object, Scope] = {}  # holds the scopes, whose ids are in the keys
        self.called: set[FunctionKey] = set()
        self.opset = version_of(model.opset_import)

    def nodes(self, operators: AbstractSet[str]) -> Iterator[tuple[NodeProto, Scope]]:
        """Yield the nodes of the graph, then those of functions that nothing calls."""
        left = _MAX_NODES
        starts = [Scope(self.model.graph, self.constants, self.opset)]
        for start in self._with_uncalled(starts):
            pending = [(start, iter(start.proto.node))]
            while pending:
                scope, nodes = pending[-1]
                node = next(nodes, None)
                if node is None:
                    pending.pop()
                    continue
                left -= 1
                if left < 0:
                    raise TooMuchWork(f"file must hold at most {_MAX_NODES:,} nodes, got more.")
                operator = node.op_type
                if operator in operators:
                    yield node, scope
                if self.functions or operator in _WITH_GRAPHS or node.domain not in _STANDARD:
                    pending += [(inner, iter(inner.proto.node)) for inner in reversed(self._inside(node, scope))]

    def _with_uncalled(self, starts: list[Scope]) -> Iterator[Scope]:
        """Yield these scopes and then the functions that no node of them called, each on its own."""
        yield from starts
        for key, function in self.functions.items():
            if key not in self.called:
                constants = self.constants.of_function(function, {}, {})
                yield Scope(function, constants, self._opset_of(function))

    def _inside(self, node: NodeProto, scope: Scope) -> list[Scope]:
        """Return the scopes that a node opens: its subgraphs, or the function that it calls."""
        inner = [Scope(graph, scope.constants.inside(graph), scope.opset, scope.names) for graph in subgraphs(node)]
        call = self._call(node, scope) if self.functions else None
        return inner if call is None else [*inner, call]

    def _call(self, node: NodeProto, scope: Scope) -> Scope | None:
        """Return the function that a node calls, or None if it calls none or one that was called this way before."""
        key = (node.domain, node.op_type, node.overload)
        function = self.functions.get(key)
        if function is None:
            return None
        self.called.add(key)
        pairs = [pair for pair in zip(function.input, node.input, strict=False) if pair[1]]
        places = {formal: place for formal, actual in pairs if (place := scope.constants.place(actual)) is not None}
        attributes = self._attributes(function, node, scope)
        weights = sorted((formal, id(place.scope), place.name) for formal, place in places.items())
        settings = sorted((name, _identity(attribute)) for name, attribute in attributes.items())
        identity = (key, *weights, *settings)
        if identity in self.calls:
            return None
        if len(self.calls) >= _MAX_CALLS:
            raise TooMuchWork(f"file must call functions with at most {_MAX_CALLS:,} sets of weights, got more.")
        names = {formal: scope.names.get(actual, actual) for formal, actual in pairs}
        constants = scope.constants.of_function(function, places, attributes)
        self.calls[identity] = Scope(function, constants, self._opset_of(function), names)
        return self.calls[identity]

    def _attributes(self, function: FunctionProto, node: NodeProto, scope: Scope) -> dict[str, AttributeProto]:
        """Return the attributes of a call by name: those of the node, else the defaults of the function."""
        return {part.name: part for part in function.attribute_proto} | scope.constants.attributes(node)

    def _opset_of(self, function: FunctionProto) -> int:
        return version_of(function.opset_import) if function.opset_import else self.opset


def _identity(attribute: AttributeProto) -> bytes:
    """Return what two equal attributes share; large ones count as different."""
    small = attribute.ByteSize() <= _MAX_KEY_BYTES
    return attribute.SerializeToString(deterministic=True) if small else str(id(attribute)).encode()
