"""Fuses the activation or residual addition that follows a BN layer into the layer."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.observe.passes.calling import Batch, Forward
from bnlab.observe.passes.executed_graph import ExecutedGraph, execute
from bnlab.observe.passes.subject import untouched, usage_error_unless
from bnlab.records import Change, LeftAlone
from bnlab.remedies._followed import followed_by
from bnlab.remedies.convert.change_class import change_class
from bnlab.remedies.convert.families import class_name
from bnlab.remedies.convert.followers import Followers, followers, has_hooks
from bnlab.remedies.convert.methods import methods_that_call
from bnlab.remedies.convert.places import Place, PlaceReader, is_sequence
from bnlab.remedies.convert.rewrite import require_rewritable, rewritten
from bnlab.remedies.refusal import Refusal, attempted
from bnlab.remedies.undo import UndoStack
from bnlab.remedies.witness import behaviour_of, differences

__all__ = ["Fused", "fuse_followers"]

_TOLERANCE = 1e3
"""Largest difference allowed, in eps of the dtype. A fused layer may add the terms of a gradient in another order."""


@dataclass
class Fused:
    """The changes that fusing made, and the layers that it left alone."""

    changes: list[Change] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)


def fuse_followers(
    model: nn.Module,
    example: Batch,
    layers: Mapping[str, _BatchNorm],
    undo: UndoStack,
    forward: Forward,
) -> Fused:
    """Fuse layers of bnlab with the activation or addition that follows them when the model runs the example.

    In a Sequential, the activation module after a layer becomes an Identity. Elsewhere, the forward of the module that
    runs the activation or addition is rewritten without it.

    Args:
        model: The model, which is changed in place.
        example: A batch that the model accepts in either mode.
        layers: The layers to fuse by path.
        undo: The stack to which the undo function of each change is added.
        forward: Calls the model on the example.

    Raises:
        UsageError: If the fused model gives other outputs, gradients or buffers than before.
    """
    with usage_error_unless("forward must run on the example in either mode"):
        before = behaviour_of(model, example, forward)
    if not any(before[f"output in {mode} mode"] for mode in ("train", "eval")):
        raise UsageError("convert: the model must return tensors to prove that fusing changed nothing, got none.")
    graphs = _executed(model, example, forward)
    fused = Fused()
    to_fuse: dict[str, Followers] = {}
    for path, layer in layers.items():
        following = attempted(partial(_followers, layer, path, graphs))
        if isinstance(following, Refusal):
            fused.left_alone.append(LeftAlone(path, following.reason))
        else:
            to_fuse[path] = following
    _settle_shared_additions(to_fuse, fused)
    places = _places(model, to_fuse, graphs[0], fused)
    _apply(model, places, graphs, fused, undo)
    _prove(before, behaviour_of(model, example, forward))
    return fused


def _executed(model: nn.Module, example: Batch, forward: Forward) -> tuple[ExecutedGraph, ExecutedGraph]:
    graphs = []
    for training in (True, False):
        with untouched(model), torch.no_grad():
            graphs.append(execute(model.train(training), example, forward=forward))
    return graphs[0], graphs[1]


def _followers(layer: _BatchNorm, path: str, graphs: tuple[ExecutedGraph, ExecutedGraph]) -> Followers:
    if not isinstance(layer, BatchNormBase):
        raise Refusal("it is not a layer of bnlab")
    if layer.activation is not None or followed_by(layer):
        raise Refusal("it has an activation already")
    if has_hooks(layer):
        raise Refusal("a hook reads its output")
    in_train, in_eval = (followers(graph, path) for graph in graphs)
    if (in_train.activation, in_train.residual) != (in_eval.activation, in_eval.residual):
        raise Refusal("different operations follow it in train mode and in eval mode")
    return in_train


def _settle_shared_additions(to_fuse: dict[str, Followers], fused: Fused) -> None:
    """Choose one layer where two BN layers are added to each other: the one nearest to the top of the module tree."""
    by_sum: dict[int, list[str]] = {}
    for path, following in to_fuse.items():
        if following.residual:
            by_sum.setdefault(id(following.last), []).append(path)
    for paths in by_sum.values():
        paths.sort(key=lambda path: path.count("."))
        for path in paths[1:]:
            del to_fuse[path]
            fused.left_alone.append(LeftAlone(path, f"{paths[0]} takes in the addition"))


def _places(model: nn.Module, to_fuse: Mapping[str, Followers], graph: ExecutedGraph, fused: Fused) -> dict[str, Place]:
    """Return the place of each operation to fuse, by the path of its layer."""
    reader, places = PlaceReader(model), {}
    for path, following in to_fuse.items():
        place = attempted(partial(reader.place, path, following, graph.of_layer(path)[0].modules))
        if isinstance(place, Refusal):
            fused.left_alone.append(LeftAlone(path, place.reason))
        else:
            places[path] = place
    _keep_whole_lists(model, places, fused)
    return places


def _keep_whole_lists(model: nn.Module, places: dict[str, Place], fused: Fused) -> None:
    """Leave alone the layers of a list that is not fused as a whole: the code calls all of its elements alike."""
    by_list: dict[str, list[str]] = {}
    for path, place in places.items():
        if place.element is not None:
            by_list.setdefault(place.element.rpartition(".")[0], []).append(path)
    for name, paths in by_list.items():
        elements = [f"{name}.{index}" for index, _ in model.get_submodule(name).named_children()]
        fusing = [str(places[path].element) for path in paths]
        other = next((element for element in elements if element not in fusing), None)
        for path in paths:
            if other is not None:
                del places[path]
                fused.left_alone.append(LeftAlone(path, f"the same code calls {other}, which cannot take it in"))


def _apply(
    model: nn.Module,
    places: Mapping[str, Place],
    graphs: tuple[ExecutedGraph, ExecutedGraph],
    fused: Fused,
    undo: UndoStack,
) -> None:
    """Fuse each layer with the operation at its place."""
    by_module: dict[str, list[str]] = {}
    for path, place in places.items():
        if place.module is not None and not place.residual:
            by_module.setdefault(place.module, []).append(path)
    replaced = {name for name, paths in by_module.items() if _runs_only_here(model, name, paths, places, graphs)}
    for name in replaced:
        module = model.get_submodule(name)
        fused.changes.append(Change(name, "class", class_name(type(module)), class_name(nn.Identity)))
        undo.push(module, change_class(module, nn.Identity(), plain=type(module)()))
        for path in by_module[name]:
            _activate(model.get_submodule(path), path, places[path].activation, fused, undo)
    by_container: dict[str, list[str]] = {}
    for path, place in places.items():
        if place.module not in replaced or place.residual:
            by_container.setdefault(place.container, []).append(path)
    for name, paths in by_container.items():
        reason = attempted(partial(_rewrite, model, name, {path: places[path] for path in paths}, fused, undo))
        if isinstance(reason, Refusal):
            fused.left_alone += [LeftAlone(path, reason.reason) for path in paths]


def _runs_only_here(
    model: nn.Module,
    name: str,
    paths: Sequence[str],
    places: Mapping[str, Place],
    graphs: tuple[ExecutedGraph, ExecutedGraph],
) -> bool:
    """Return whether an activation module runs directly after these layers and nowhere else."""
    module, (parent, _, attribute) = model.get_submodule(name), name.rpartition(".")
    calls = [sum(call.modules[-1:] == (name,) for call in graph.calls) for graph in graphs]
    has_one_path = sum(other is module for _, other in model.named_modules(remove_duplicate=False)) == 1
    if calls != [len(paths)] * 2 or has_hooks(module) or not has_one_path:
        return False
    container = model.get_submodule(parent)
    if is_sequence(container):
        return True
    methods = attempted(lambda: methods_that_call(container, attribute))
    if isinstance(methods, Refusal):
        return False
    own = {flow.activated for path in paths for flow in places[path].flows if flow.activated is not None}
    calling = [call for method in methods for call in method.calls_of(attribute)]
    return len(calling) == len(own) and set(map(ast.unparse, calling)) == set(map(ast.unparse, own))


def _rewrite(model: nn.Module, name: str, places: Mapping[str, Place], fused: Fused, undo: UndoStack) -> None:
    """Rewrite the methods of a module without the operations that its layers take in."""
    container = model.get_submodule(name)
    flows = [flow for place in places.values() for flow in place.flows]
    if not flows:
        raise Refusal("the activation module that follows it is used elsewhere too, or has hooks")
    require_rewritable(container, {flow.method.name: flow.method for flow in flows}.values())
    old_kind, new_kind = type(container), rewritten(container, flows)
    undo.push(container, partial(setattr, container, "__class__", old_kind))
    container.__class__ = new_kind
    fused.changes.append(Change(name, "forward", class_name(old_kind), "rewritten for its fused layers"))
    for path, place in places.items():
        layer = model.get_submodule(path)
        if place.residual:
            layer.takes_residual = True  # type: ignore[assignment]
            undo.push(layer, partial(vars(layer).pop, "takes_residual", None))
            fused.changes.append(Change(path, "residual", "-", "taken in"))
        _activate(layer, path, place.activation, fused, undo)


def _activate(layer: nn.Module, path: str, activation: str | None, fused: Fused, undo: UndoStack) -> None:
    if activation is not None:
        undo.push(layer, partial(setattr, layer, "activation", None))
        layer.activation = activation  # type: ignore[assignment]
        fused.changes.append(Change(path, "activation", "None", activation))


def _prove(before: Mapping[str, list[torch.Tensor | None]], after: Mapping[str, list[torch.Tensor | None]]) -> None:
    for what, difference in differences(dict(before), dict(after)).items():
        dtypes = {tensor.dtype for tensor in before[what] if tensor is not None and tensor.is_floating_point()}
        allowed = _TOLERANCE * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        if not difference <= allowed:
            raise UsageError(
                f"convert: the fused model must give the {what} it gave before, got a difference of {difference:.2g} "
                f"of the largest value. Leave fuse out, or name the layers to fuse with layers=."
            )
