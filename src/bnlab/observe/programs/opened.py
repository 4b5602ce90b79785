"""Opens a program as a model: modules that share its tensors take the place of its BN operators."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode
from typing_extensions import Self, override

from bnlab.errors import UsageError
from bnlab.observe.programs.graph_layers import (
    GraphLayer,
    GraphLayers,
    attribute_at,
    graph_layers,
    path_of,
    source_of,
)
from bnlab.observe.programs.operators import operator_arguments, operator_name
from bnlab.observe.programs.shared_modules import (
    ProgramBatchNorm,
    activation_function,
    batch_norm_module,
    dropout_module,
    filter_module,
)
from bnlab.uninterrupted import restores
from bnlab.wording import counted, enumerated

__all__ = ["OpenedProgram", "is_program", "opened", "require_modules"]

_MAX_NAMES = 3
_FILTERS = ("aten::conv", "aten::linear", "aten::addmm", "aten::mm")


@dataclass(frozen=True, kw_only=True)
class OpenedProgram:
    """A model to observe.

    Attributes:
        model: The model, in which the BN layers of programs are modules that share the tensors of the program.
        kind: Name of the class of the target.
        is_program: Whether the target is a program or holds one.
        stored: The modules whose running statistics other operators than batch_norm use, by path.
        left_alone: Name and reason of everything that looks like a BN layer and is not read as one.
        notes: What a user must know of the graph.
        unknown: Codes of the checks that the graph gives no evidence for, each with the reason.
        batch_size: The only number of samples in a batch that the graph takes; None if it takes any.
    """

    model: nn.Module
    kind: str
    is_program: bool = False
    stored: Mapping[str, nn.Module] = field(default_factory=dict)
    left_alone: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    batch_size: int | None = None


def is_program(target: object) -> bool:
    """Return whether a target is what `torch.export.export` returns."""
    exported: Any = sys.modules.get("torch.export")  # a program can only exist where it is imported
    return exported is not None and isinstance(target, exported.ExportedProgram)


@restores
def opened(target: Any) -> Iterator[OpenedProgram]:  # noqa: ANN401
    """Yield a target as a model whose BN layers are modules.

    A program itself does not change. Where a module holds a program, the opened one takes its place until the block
    ends.

    Args:
        target: A `torch.export.ExportedProgram`, a GraphModule of operators, or any other module.

    Raises:
        UsageError: If the target is no module, a graph without its tensors, or an unflattened program.
    """
    kind = type(target).__name__
    if is_program(target):
        with _without_warnings_of_copies():
            target = target.module()
    if not isinstance(target, nn.Module):
        raise UsageError(f"model: it must be a torch.nn.Module, got {kind}.")
    programs = _programs(target)
    if not programs:
        yield OpenedProgram(model=target, kind=kind)
        return
    originals = {path: cast("GraphModule", target.get_submodule(path)) for path in programs}
    inner = {path: _open(originals[path], layers) for path, layers in programs.items()}
    if "" in inner:
        yield replace(inner[""], kind=kind)
        return
    try:
        for path, program in inner.items():
            _place(target, path, program.model)
        yield _joined(target, kind, inner)
    finally:
        for path, original in originals.items():
            _place(target, path, original)


def require_modules(model: object) -> None:
    """Refuse a model whose BN layers are operators of a graph, for an action that changes layers.

    Raises:
        UsageError: If the model is a program or holds one with a BN layer.
    """
    places = []
    if isinstance(model, nn.Module):
        parts = ((path, layers, model.get_submodule(path)) for path, layers in _programs(model).items())
        places = [path for path, layers, part in parts if layers.has_batch_norm or _refuses_modes(part)]
    if is_program(model) or places:
        where = f" in {places[0]}" if any(places) else ""
        raise UsageError(
            f"model: its layers must be modules to be changed, got the operators of a graph{where} "
            f"({type(model).__name__}). Change the model before you export it."
        )


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    model.get_submodule(path_of(path))._modules[path.rpartition(".")[2]] = module  # noqa: SLF001


def _programs(model: nn.Module) -> dict[str, GraphLayers]:
    """Return the outermost graphs of operators in a model by path, with what they show of BN.

    Raises:
        UsageError: If the model is an unflattened program, whose modules are graphs themselves.
    """
    unflatten: Any = sys.modules.get("torch.export.unflatten")
    if unflatten is not None and any(isinstance(module, unflatten.UnflattenedModule) for module in model.modules()):
        raise UsageError(
            f"{type(model).__name__}: it must not be an unflattened program. Pass the ExportedProgram itself, or the "
            "model that was exported."
        )
    programs: dict[str, GraphLayers] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}." if other else "") for other in programs)
        if not isinstance(module, GraphModule) or isinstance(module, _OpenedGraph) or inside:
            continue
        layers = graph_layers(module)
        if layers.has_batch_norm or layers.left_alone or _refuses_modes(module):
            programs[path] = layers
    return programs


def _refuses_modes(module: nn.Module) -> bool:
    """Return whether train() and eval() of a module are replaced, as those of exported modules that refuse them."""
    return {"train", "eval"} <= vars(module).keys()


def _open(program: GraphModule, shown: GraphLayers) -> OpenedProgram:
    _require_tensors(program)
    twin = _Twin(program, shown.layers)
    stored = {path: program.get_submodule(path) for path in shown.stored}
    size = _batch_size(program.graph)
    trains = [layer.name for layer in shown.layers.values() if layer.trains]
    return OpenedProgram(
        model=twin.module,
        kind=type(program).__name__,
        is_program=True,
        stored=stored,
        left_alone=shown.left_alone,
        notes=tuple(_notes(shown, trains, size)),
        unknown=_unknown(twin, trains, size),
        batch_size=size,
    )


def _joined(model: nn.Module, kind: str, inner: Mapping[str, OpenedProgram]) -> OpenedProgram:
    """Return the opened programs inside a model as one."""
    return OpenedProgram(
        model=model,
        kind=kind,
        is_program=True,
        stored={f"{path}.{name}": module for path, program in inner.items() for name, module in program.stored.items()},
        left_alone=tuple(
            (f"{path}.{name}", why) for path, program in inner.items() for name, why in program.left_alone
        ),
        notes=tuple(f"{path}: {note}" for path, program in inner.items() for note in program.notes),
        unknown={code: why for program in inner.values() for code, why in program.unknown.items()},
    )


def _require_tensors(program: GraphModule) -> None:
    for node in program.graph.nodes:
        arguments = None if node.op != "call_function" else operator_arguments(node.target, node.args, node.kwargs)
        mean = None if arguments is None else arguments.running_mean
        if isinstance(mean, Node) and mean.op == "placeholder":
            raise UsageError(
                f"{type(program).__name__}: target must hold its tensors, got a graph that takes {mean.name} as an "
                "input. Pass the ExportedProgram, or its module()."
            )


def _batch_size(graph: Graph) -> int | None:
    """Return the first dimension of the first tensor input, if the graph was recorded for this size alone."""
    inputs = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    first = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
    return first.shape[0] if first is not None and isinstance(first.shape[0], int) else None


def _notes(layers: GraphLayers, trains: Collection[str], size: int | None) -> Iterator[str]:
    total = len(layers.layers)
    if total:
        yield (
            "the target is a graph of operators: it is measured with BN modules in place of its BN operators, which "
            "share its tensors"
        )
    if trains:
        which = "every BN layer" if len(trains) == total else enumerated(list(trains), _MAX_NAMES)
        yield (
            f"the graph was exported in train mode: it normalises with the batch in {which}, also after eval(). Export "
            "in eval mode to deploy it, or call move_exported_model_to_eval of torchao"
        )
    if size is not None:
        yield f"the graph takes batches of {counted(size, 'sample')} only"
    for name, operators in layers.stored.items():
        yield f"{name or 'the root'}: the graph normalises {operators}: only its stored numbers are checked"
    if layers.in_subgraphs:
        operators = counted(layers.in_subgraphs, "batch_norm operator")
        yield f"{operators} in subgraphs: no measurement changes their mode"


def _unknown(twin: _Twin, trains: Collection[str], size: int | None) -> dict[str, str]:
    """Return why checks cannot judge the graph, by their codes."""
    unknown = {"BN212": "eval() does not reach the operators of a graph, whose mode was fixed by the export"}
    if not trains and not twin.has_dropout:
        unknown["BN205"] = "a graph that was exported in eval mode may lack the dropout of its model"
    if twin.has_other_filters:
        unknown["BN201"] = "the graph computes the weights of its convolutions, or spells linear layers out"
    if size is not None:
        unknown["BN302"] = f"the graph takes batches of {counted(size, 'sample')} only, so that no part of one runs"
    return unknown


class _OpenedGraph(GraphModule):
    """A graph with modules in place of operators.

    GraphModule prints a traceback when its forward raises. This class leaves the error to its caller.
    """

    @override
    def recompile(self) -> PythonCode:
        """Compile the graph, and call the result as that of any other module."""
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return code

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the graph and its modules."""
        with _without_warnings_of_copies():
            copied: Self = super().__deepcopy__(memo)  # type: ignore[assignment]
        return copied


@contextmanager
def _without_warnings_of_copies() -> Iterator[None]:
    """Silence what torch warns of when it copies its own descriptions of inputs: a caller can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _Twin:
    """A copy of a graph with modules in place of operators.

    Args:
        program: The module of the graph, which does not change.
        layers: Its BN layers.
    """

    def __init__(self, program: GraphModule, layers: Mapping[str, GraphLayer]) -> None:
        self._program = program
        with _without_warnings_of_copies():
            self._graph: Graph = copy.deepcopy(program.graph)
        self._own: dict[str, Any] = {}
        self._replaced: set[Node] = set()
        self.has_dropout = self.has_other_filters = False
        nodes = dict(zip(program.graph.nodes, list(self._graph.nodes), strict=True))
        for layer in layers.values():
            self._put_layer(layer, nodes)
        self._drop_updates()
        for node in list(self._graph.nodes):
            if node.op == "call_function":
                self._put_other(node)
        self._hide_statistics()
        self._drop_unused()
        self.module = self._built(any(layer.trains for layer in layers.values()))

    def _put_layer(self, layer: GraphLayer, nodes: Mapping[Node, Node]) -> None:
        path = self._free_path(layer.name, layer.name)
        self._own[path] = batch_norm_module(self._program, layer)
        for original, arguments in layer.calls:
            node = nodes[original]
            now = operator_arguments(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
            assert now is not None  # the node is a copy of the original
            self._replaced.add(node)
            self._replace(node, self._call(node, path, now.input), is_tuple=arguments.is_tuple)

    def _put_other(self, node: Node) -> None:
        """Put a module or function of torch in the place of a filter, dropout or activation."""
        module = filter_module(self._program, node)
        if module is not None:
            weight = source_of(node.args[1])
            path = self._free_path(path_of(weight or ""), node.name)
        else:
            self.has_other_filters |= operator_name(node.target).startswith(_FILTERS)  # type: ignore[arg-type]
            module = dropout_module(node)
            path = self._free_path(node.name, node.name)
            function = activation_function(node)
            if module is None:
                node.target = node.target if function is None else function
                return
            self.has_dropout = True
        self._own[path] = module
        is_tuple = operator_name(node.target) == "aten::native_dropout"  # type: ignore[arg-type]
        self._replace(node, self._call(node, path, node.args[0]), is_tuple=is_tuple)

    def _call(self, node: Node, path: str, argument: Any) -> Node:  # noqa: ANN401
        with self._graph.inserting_before(node):
            output = self._graph.call_module(path, (argument,))
        output.meta = {}
        return output

    def _replace(self, node: Node, output: Node, *, is_tuple: bool) -> None:
        """Put an output in the place of a node, or of the first element of its result if that is a tuple."""
        for old in [user for user in node.users if user.args[1] == 0] if is_tuple else [node]:
            old.replace_all_uses_with(output)
            self._graph.erase_node(old)

    def _free_path(self, wanted: str, otherwise: str) -> str:
        """Return a path for a module: the wanted one, unless the program has another module or tensor there."""
        taken = {str(node.target) for node in self._graph.nodes if node.op in ("call_module", "get_attr")}
        place: object = self._program
        for name in wanted.split("."):
            place = getattr(place, name, None)
        is_free = place is None or (type(place) is nn.Module and not list(place.children()))
        if wanted and is_free and wanted not in taken and wanted not in self._own:
            return wanted
        name = otherwise.replace(".", "_")
        while name in taken or name in self._own or hasattr(self._program, name):
            name += "_"
        return name

    def _drop_updates(self) -> None:
        """Remove the operators that write to the buffers of the BN layers, which the modules update instead."""
        buffers = {id(buffer) for module in self._own.values() for buffer in module.buffers()}
        for node in reversed(list(self._graph.nodes)):
            if node.op != "call_function" or node.users or not operator_name(node.target).endswith("_"):
                continue
            path = source_of(node.args[0]) if node.args else None
            if path is not None and id(attribute_at(self._program, path)) in buffers:
                self._graph.erase_node(node)

    def _hide_statistics(self) -> None:
        """Let other operators read running statistics under another name, because a pass withholds them from a layer.

        A module with attributes of these names counts as a BN layer, so they move to the root.
        """
        for node in self._graph.nodes:
            if node.op == "get_attr" and str(node.target).rpartition(".")[2] in ("running_mean", "running_var"):
                value = attribute_at(self._program, str(node.target))
                node.target = f"_stored_{str(node.target).replace('.', '_')}"
                self._own[node.target] = value

    def _drop_unused(self) -> None:
        """Remove the nodes without effect that nothing uses any more."""
        for node in reversed(list(self._graph.nodes)):
            is_pure = node.op == "get_attr" or (node.op == "call_function" and not node.is_impure())
            if (is_pure or node in self._replaced) and not node.users:
                self._graph.erase_node(node)

    def _built(self, trains: bool) -> GraphModule:
        targets = {str(node.target) for node in self._graph.nodes if node.op in ("call_module", "get_attr")}
        attributes = {
            target: self._own[target] if target in self._own else attribute_at(self._program, target)
            for target in sorted(targets)
        }
        module = _OpenedGraph(attributes, self._graph, type(self._program).__name__)
        for path, part in module.named_modules():
            is_own = path in self._own
            if not path or type(part) is nn.Module or (is_own and not isinstance(part, (ProgramBatchNorm, nn.Dropout))):
                part.training = trains
        return module
