"""Finds the BN layers of a graph of operators: which operators normalise, and which buffers they use."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase

from bnlab.observe.programs.operators import OperatorArguments, is_instance_norm, operator_arguments, operator_name

__all__ = ["INSTANCE_NORM", "GraphLayer", "GraphLayers", "attribute_at", "graph_layers", "path_of", "source_of"]

INSTANCE_NORM = (
    "is instance normalization: train mode normalises each sample by itself, and only eval mode uses its running "
    "statistics, which no check judges"
)
"""Why an instance normalization with running statistics is no BN layer, as the end of a sentence."""

_SAME_TENSOR = frozenset({"aten::alias", "aten::detach", "aten::clone", "aten::contiguous", "aten::lift_fresh_copy"})
_REPEATS = frozenset({"aten::repeat", "aten::expand"})
_VIEWS = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view"})
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class GraphLayer:
    """A BN layer of a graph.

    Attributes:
        name: Its path, from the path of its buffers, such as "bn1" for "bn1.running_mean".
        calls: The nodes that normalise with it, with their arguments.
    """

    name: str
    calls: tuple[tuple[Node, OperatorArguments], ...]

    @property
    def trains(self) -> bool:
        """Whether it has running statistics, and any of its operators normalises with the batch nevertheless."""
        return self.keeps_statistics and any(arguments.training for _, arguments in self.calls)

    @property
    def keeps_statistics(self) -> bool:
        """Whether its operators have running statistics."""
        return self.calls[0][1].running_mean is not None


@dataclass(frozen=True)
class GraphLayers:
    """What a graph shows of BN.

    Attributes:
        layers: The BN layers by path.
        stored: Modules with running statistics that other operators use, by path, with a description of these.
        left_alone: Name and reason of everything that looks like a BN layer and is not read as one.
        in_subgraphs: Number of operators of batch normalization in subgraphs.
    """

    layers: Mapping[str, GraphLayer] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    left_alone: tuple[tuple[str, str], ...] = ()
    in_subgraphs: int = 0

    @property
    def has_batch_norm(self) -> bool:
        """Whether operators of the graph normalise as BN does."""
        return bool(self.layers or self.stored or self.in_subgraphs)


def graph_layers(program: GraphModule) -> GraphLayers:
    """Return the BN layers of a graph whose tensors are attributes of its module."""
    modules = dict(program.named_modules())
    calls: dict[str, list[tuple[Node, OperatorArguments]]] = {}
    stored: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    for node, arguments in _normalisations(program.graph):
        name = _name(program, node, arguments)
        if _is_instance_norm(node, arguments):
            left_alone[name] = INSTANCE_NORM
        elif _is_readable(node, arguments):
            calls.setdefault(name, []).append((node, arguments))
        elif name in modules and _keeps_statistics(modules[name]):
            stored[name] = f"by {operator_name(node.target)}"  # type: ignore[arg-type]
        else:
            left_alone[name] = "normalises with tensors that the graph computes"
    used = {path_of(str(node.target)) for node in program.graph.nodes if node.op == "get_attr" and node.users}
    holders = {path_of(source_of(a.running_mean) or "") for of in calls.values() for _, a in of if a.running_mean}
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    for name, module in modules.items():
        known = name in holders or name in calls or name in stored or name in left_alone
        is_called = any(name == path or name.startswith(f"{path}.") for path in called)
        if known or is_called or isinstance(module, _NormBase) or not _keeps_statistics(module):
            continue
        if name in used:
            stored[name] = "by other operators than batch_norm"
        else:
            left_alone[name] = "has running statistics that the graph does not use, as after folding"
    layers = {name: GraphLayer(name, tuple(of)) for name, of in calls.items() if _agree(of)}
    left_alone |= dict.fromkeys(calls.keys() - layers.keys(), "normalises with different tensors in different places")
    layers = {name: layer for name, layer in layers.items() if name not in stored and name not in left_alone}
    return GraphLayers(layers, stored, tuple(left_alone.items()), _count_in_subgraphs(program))


def source_of(value: Any) -> str | None:  # noqa: ANN401
    """Return the path of the attribute that a node stands for; None for a tensor that is computed or passed in."""
    while isinstance(value, Node):
        if value.op == "get_attr":
            return str(value.target)
        if value.op != "call_function":
            return None
        value = _updated(value) if value.target is operator.getitem else _same_tensor(value)
    return None


def _same_tensor(node: Node) -> Any:  # noqa: ANN401
    """Return the tensor that a node copies, views as a whole, or changes in place; None for any other node."""
    name = operator_name(node.target)  # type: ignore[arg-type]
    return node.args[0] if node.args and (name in _SAME_TENSOR or name.endswith("_")) else None


def _updated(node: Node) -> Any:  # noqa: ANN401
    """Return the running statistic whose update an element of a result is; None for any other element."""
    call, place = node.args
    arguments = None
    if isinstance(call, Node) and call.op == "call_function" and callable(call.target):
        arguments = operator_arguments(call.target, call.args, call.kwargs)
    if arguments is None or not isinstance(place, int):
        return None
    return getattr(arguments, _names_of_results(call)[place].removesuffix("_out"), None)


def _names_of_results(call: Any) -> list[str]:  # noqa: ANN401
    """Return the names of the results of an operator, "" for one without a name."""
    return [result.name or "" for result in call.target._schema.returns]  # noqa: SLF001 - the only way to the names


def attribute_at(program: nn.Module, path: str) -> Any:  # noqa: ANN401
    """Return the module, tensor or other attribute at a path of a program."""
    owner: Any = program
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def path_of(target: str) -> str:
    """Return the path of the module that holds an attribute."""
    return target.rpartition(".")[0]


def _normalisations(graph: Graph) -> Iterator[tuple[Node, OperatorArguments]]:
    """Yield every call of batch or instance normalization."""
    for node in graph.nodes:
        if node.op != "call_function" or not callable(node.target):
            continue
        arguments = operator_arguments(node.target, node.args, node.kwargs)
        if arguments is None and is_instance_norm(node.target):
            named = dict(zip(("input", "weight", "bias", *_STATISTICS), node.args, strict=False)) | node.kwargs
            arguments = OperatorArguments(
                name=operator_name(node.target),
                input=named.get("input"),
                weight=named.get("weight"),
                bias=named.get("bias"),
                running_mean=named.get("running_mean"),
                running_var=named.get("running_var"),
                training=None,
                momentum=None,
                eps=None,
                is_tuple=False,
            )
        if arguments is not None:
            yield node, arguments


def _is_instance_norm(node: Node, arguments: OperatorArguments) -> bool:
    """Return whether a call normalises each sample by itself: by its operator, or by BN on a view.

    A decomposed graph views N samples of C channels as one sample of N*C channels, and repeats the parameters.
    """
    if is_instance_norm(node.target):  # type: ignore[arg-type]
        return True
    tensors = (arguments.running_mean, arguments.weight)
    if any(isinstance(t, Node) and t.op == "call_function" and operator_name(t.target) in _REPEATS for t in tensors):  # type: ignore[arg-type]
        return True
    view = arguments.input
    if not isinstance(view, Node) or view.op != "call_function" or operator_name(view.target) not in _VIEWS:  # type: ignore[arg-type]
        return False
    before, after = _shape(view.args[0]), _shape(view)
    return bool(before and after and before[0] != 1 and after[0] == 1 and after[1] == before[0] * before[1])


def _shape(node: Any) -> tuple[Any, ...] | None:  # noqa: ANN401
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) and value.dim() > 1 else None


def _is_readable(node: Node, arguments: OperatorArguments) -> bool:
    """Return whether a module can stand for a call.

    It can where every tensor is an attribute of the program, all other arguments are constants, and the graph uses
    nothing but the output and the updated statistics.
    """
    uses_more = arguments.is_tuple and any(
        user.users and user.args[1] != 0 and _updated(user) is None for user in node.users
    )
    tensors = (arguments.weight, arguments.bias, arguments.running_mean, arguments.running_var)
    known = all(tensor is None or source_of(tensor) is not None for tensor in tensors)
    both = (arguments.running_mean is None) == (arguments.running_var is None)
    constant = isinstance(arguments.training, bool) and isinstance(arguments.eps, (int, float))
    return known and both and constant and not uses_more and arguments.name.startswith(("aten::", "batch_norm"))


def _name(program: GraphModule, node: Node, arguments: OperatorArguments) -> str:
    """Return the path of a layer: that of its buffers or parameters, else that of its module, else its node."""
    for value in (arguments.running_mean, arguments.weight, arguments.bias):
        path = source_of(_before_repeats(value))
        if path is not None and path_of(path):
            return path_of(path)
    stack = node.meta.get("nn_module_stack") or {}
    name = next((str(entry[0]) for entry in reversed(list(stack.values()))), "")
    return name if name and "@" not in name and not hasattr(program, name) else node.name


def _before_repeats(value: Any) -> Any:  # noqa: ANN401
    while isinstance(value, Node) and value.op == "call_function" and operator_name(value.target) in _REPEATS:  # type: ignore[arg-type]
        value = value.args[0]
    return value


def _keeps_statistics(module: nn.Module) -> bool:
    mean, var = (getattr(module, name, None) for name in _STATISTICS)
    return isinstance(mean, Tensor) and isinstance(var, Tensor)


def _agree(calls: list[tuple[Node, OperatorArguments]]) -> bool:
    """Return whether all calls of one path use the same tensors and eps."""
    return len({(*map(source_of, (a.running_mean, a.running_var, a.weight, a.bias)), a.eps) for _, a in calls}) == 1


def _count_in_subgraphs(program: GraphModule) -> int:
    subgraphs = [module for name, module in program.named_modules() if name and isinstance(module, GraphModule)]
    return sum(1 for module in subgraphs for _ in _normalisations(module.graph))
