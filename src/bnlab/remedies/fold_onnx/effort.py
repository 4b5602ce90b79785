"""Counts the work of a fold before it begins, so that a small file cannot ask for hours of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnlab.errors import DamagedFile
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.onnx_model.constants import Allowance, is_standard
from bnlab.observe.files.onnx_model.scopes import nodes_in, subgraphs

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto

__all__ = ["LIMITS", "count_work", "values_to_add", "values_to_read"]

LIMITS: Mapping[str, int] = {
    "nodes": 50_000,
    "BN nodes": 2_000,
    "names": 1_000_000,
    "subgraphs and functions": 5_000,
    "calls inside calls": 100,
}
"""The largest amounts. A node of a function counts once for each call, one in a subgraph once for each graph around it.
A ResNet of 1,202 layers has as many BN nodes; a detector with its loops unrolled has some ten thousand nodes."""

_WAY_OUT = "Fold the model in torch before it is exported."
_VALUES_READ = 1 << 28
_VALUES_ADDED = 3 << 24
_VALUES_A_BYTE = 16
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class _Size:
    """What runs when a function is called: its nodes with those of the calls in it, and how deep calls lie in calls."""

    nodes: int
    batch_norms: int
    depth: int


@dataclass(frozen=True)
class _Body:
    """The nodes of a graph or function, and how often it calls each function."""

    nodes: int
    batch_norms: int
    calls: Mapping[_Key, int]

    def with_calls(self, sizes: Mapping[_Key, _Size]) -> _Size:
        """Return the size with all calls replaced."""
        called = [(sizes[key], times) for key, times in self.calls.items()]
        return _Size(
            self.nodes + sum(size.nodes * times for size, times in called),
            self.batch_norms + sum(size.batch_norms * times for size, times in called),
            1 + max((size.depth for size, _ in called), default=0),
        )


def count_work(model: ModelProto, limits: Mapping[str, int] = LIMITS) -> None:
    """Refuse a model whose fold would take more work than that of any network.

    Args:
        model: The model, with or without its weights.
        limits: The largest amounts.

    Raises:
        TooMuchWork: If some amount is above its limit.
        DamagedFile: If a function calls itself, which ONNX does not allow.
    """
    budget = Budget(limits, way_out=_WAY_OUT)
    for proto, depth in _protos(model):
        budget.spend("subgraphs and functions")
        for field in ("input", "output", "initializer", "sparse_initializer", "value_info"):
            budget.spend("names", len(getattr(proto, field, ())))
        for node in proto.node:
            budget.spend("nodes", depth)
            budget.spend("BN nodes", int(is_standard(node, "BatchNormalization")))
            budget.spend("names", depth * (len(node.input) + len(node.output) + len(node.attribute)))
    if model.functions:
        _count_calls(model, budget)


def values_to_read(model: ModelProto) -> Allowance:
    """Return how many values of constants a fold may read from a model: a weight a few times for each BN beside it."""
    return Allowance(max(_VALUES_READ, _VALUES_A_BYTE * model.ByteSize()))


def values_to_add(model: ModelProto) -> Allowance:
    """Return how many values of new constants a fold may add to a model, which keeps them in memory.

    A weight that several nodes share is written once for each. A model without stored weights, as the tests of ONNX
    have them, gets the weights of a ResNet-50.
    """
    return Allowance(max(_VALUES_ADDED, _VALUES_A_BYTE * model.ByteSize()))


def _protos(model: ModelProto) -> Iterator[tuple[GraphProto | FunctionProto, int]]:
    """Yield the graph, the functions and their subgraphs, each with how many graphs it lies in, with itself."""
    pending: list[tuple[GraphProto | FunctionProto, int]] = [(model.graph, 1)]
    pending += [(function, 1) for function in model.functions]
    while pending:
        proto, depth = pending.pop()
        yield proto, depth
        pending += [(graph, depth + 1) for node in proto.node if node.attribute for graph in subgraphs(node)]


def _count_calls(model: ModelProto, budget: Budget) -> None:
    """Count the nodes that run when every call is replaced by the nodes of its function."""
    functions = {(function.domain, function.name, function.overload): function for function in model.functions}
    bodies = {key: _body(function, functions) for key, function in functions.items()}
    sizes: dict[_Key, _Size] = {}
    for key in bodies:
        _measure(key, bodies, sizes)
    total = _body(model.graph, functions).with_calls(sizes)
    budget.spend("nodes", total.nodes)
    budget.spend("BN nodes", total.batch_norms)
    budget.spend("calls inside calls", max(size.depth for size in sizes.values()))


def _body(proto: GraphProto | FunctionProto, functions: Container[_Key]) -> _Body:
    """Return what a graph or function holds, with its subgraphs."""
    batch_norms, keys = 0, []
    for node in nodes_in(proto):
        batch_norms += is_standard(node, "BatchNormalization")
        keys.append((node.domain, node.op_type, node.overload))
    return _Body(len(keys), batch_norms, Counter(key for key in keys if key in functions))


def _measure(start: _Key, bodies: Mapping[_Key, _Body], sizes: dict[_Key, _Size]) -> None:
    """Determine the size of a function, after those of all functions that it calls."""
    path = {start: iter(bodies[start].calls)}
    while path:
        key = next(reversed(path))
        called = next((other for other in path[key] if other not in sizes), None)
        if called is None:
            sizes[key] = bodies[key].with_calls(sizes)
            del path[key]
        elif called in path:
            raise DamagedFile(f"file must be a valid ONNX model, got a function {called[1]!r} that calls itself.")
        else:
            path[called] = iter(bodies[called].calls)
