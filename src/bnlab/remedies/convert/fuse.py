"""Fuses the activation or residual addition that follows a BN layer into the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.observe.passes.batches import Batch, Forward
from bnlab.observe.passes.executed_graph import Call, ExecutedGraph, execute
from bnlab.observe.passes.subject import untouched, usage_error_unless
from bnlab.records import Change, LeftAlone
from bnlab.remedies._followed import followed_by
from bnlab.remedies._rewritten import rewritten_class
from bnlab.remedies.convert.change_class import change_class
from bnlab.remedies.convert.families import class_name
from bnlab.remedies.convert.followers import Followers, activation_of_module, followers, has_hooks
from bnlab.remedies.convert.rewrite import fused_graph, traced
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
    _replace_activation_modules(model, to_fuse, graphs, fused, undo)
    _rewrite_containers(model, to_fuse, graphs[0], fused, undo)
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


def _replace_activation_modules(
    model: nn.Module,
    to_fuse: dict[str, Followers],
    graphs: tuple[ExecutedGraph, ExecutedGraph],
    fused: Fused,
    undo: UndoStack,
) -> None:
    """Replace activation modules by an Identity if they follow their layer in a Sequential and run nowhere else."""
    by_module: dict[str, list[str]] = {}
    for path, following in to_fuse.items():
        if not following.residual and activation_of_module(_innermost(model, following.last)) is not None:
            by_module.setdefault(following.last.modules[-1], []).append(path)
    for name, paths in by_module.items():
        module = model.get_submodule(name)
        calls = [sum(call.modules[-1:] == (name,) for call in graph.calls) for graph in graphs]
        if (
            calls != [len(paths)] * 2
            or has_hooks(module)
            or not all(_side_by_side(model, path, name) for path in paths)
        ):
            continue
        fused.changes.append(Change(name, "class", class_name(type(module)), class_name(nn.Identity)))
        undo.push(module, change_class(module, nn.Identity(), plain=type(module)()))
        for path in paths:
            _activate(model.get_submodule(path), path, to_fuse.pop(path).activation, fused, undo)


def _side_by_side(model: nn.Module, layer: str, activation: str) -> bool:
    """Return whether the activation directly follows the layer in a Sequential, and each has only one path."""
    parent, _, last = layer.rpartition(".")
    sequence = model.get_submodule(parent)
    if not isinstance(sequence, nn.Sequential) or type(sequence).forward is not nn.Sequential.forward:
        return False
    names = [f"{parent}.{name}".removeprefix(".") for name in sequence._modules]  # noqa: SLF001
    pair = (model.get_submodule(layer), model.get_submodule(activation))
    once = all(sum(other is m for _, other in model.named_modules(remove_duplicate=False)) == 1 for m in pair)
    return once and bool(last) and names[names.index(layer) + 1 :][:1] == [activation]


def _rewrite_containers(
    model: nn.Module, to_fuse: dict[str, Followers], graph: ExecutedGraph, fused: Fused, undo: UndoStack
) -> None:
    """Rewrite the forward of every module that runs both a layer and the operation that follows it."""
    by_container: dict[str, list[str]] = {}
    for path, following in to_fuse.items():
        caller = graph.of_layer(path)[0].modules[-2] if path else ""
        if _container(model, following.last) != caller:
            fused.left_alone.append(LeftAlone(path, "the operation that follows it runs in another module"))
        elif isinstance(model.get_submodule(caller), nn.Sequential) or not path:
            reason = "the activation module that follows it is used elsewhere too, or has hooks"
            fused.left_alone.append(LeftAlone(path, reason))
        else:
            by_container.setdefault(caller, []).append(path)
    for name, paths in by_container.items():
        container = model.get_submodule(name)
        inside = {path.removeprefix(f"{name}."): to_fuse[path].residual for path in paths}
        rewritten = attempted(partial(_rewritten_graph, container, inside))
        if isinstance(rewritten, Refusal):
            fused.left_alone += [LeftAlone(path, rewritten.reason) for path in paths]
            continue
        new_graph, activations = rewritten
        old_kind = type(container)
        undo.push(container, partial(setattr, container, "__class__", old_kind))
        container.__class__ = rewritten_class(old_kind, new_graph)
        fused.changes.append(Change(name, "forward", class_name(old_kind), "rewritten for its fused layers"))
        for path, activation, residual in zip(paths, activations.values(), inside.values(), strict=True):
            if residual:
                layer = model.get_submodule(path)
                layer.takes_residual = True  # type: ignore[assignment]
                undo.push(layer, partial(vars(layer).pop, "takes_residual", None))
                fused.changes.append(Change(path, "residual", "-", "taken in"))
            _activate(model.get_submodule(path), path, activation, fused, undo)


def _rewritten_graph(container: nn.Module, inside: Mapping[str, bool]) -> tuple[fx.Graph, dict[str, str | None]]:
    graph = traced(container)
    return graph, fused_graph(container, graph, inside)


def _activate(layer: nn.Module, path: str, activation: str | None, fused: Fused, undo: UndoStack) -> None:
    if activation is not None:
        undo.push(layer, partial(setattr, layer, "activation", None))
        layer.activation = activation  # type: ignore[assignment]
        fused.changes.append(Change(path, "activation", "None", activation))


def _innermost(model: nn.Module, call: Call) -> nn.Module:
    return model.get_submodule(call.modules[-1])


def _container(model: nn.Module, call: Call) -> str:
    """Return the path of the module whose forward made a call, either directly or through an activation module."""
    inside = activation_of_module(_innermost(model, call)) is not None and len(call.modules) > 1
    return call.modules[-2] if inside else call.modules[-1]


def _prove(before: Mapping[str, list[torch.Tensor | None]], after: Mapping[str, list[torch.Tensor | None]]) -> None:
    for what, difference in differences(dict(before), dict(after)).items():
        dtypes = {tensor.dtype for tensor in before[what] if tensor is not None and tensor.is_floating_point()}
        allowed = _TOLERANCE * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        if not difference <= allowed:
            raise UsageError(
                f"convert: the fused model must give the {what} it gave before, got a difference of {difference:.2g} "
                f"of the largest value. Leave fuse out, or name the layers to fuse with layers=."
            )
