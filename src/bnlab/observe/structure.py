"""Reads the surroundings of each BN layer from the executed graph: producer, activation and dropout upstream."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.observe.discover import channels_of
from bnlab.observe.feature_axis import feature_axes
from bnlab.observe.filter_norms import FILTERING, filter_norms
from bnlab.observe.model_evidence import Execution, Producer
from bnlab.observe.passes.dropout import dropping_call, dropping_paths
from bnlab.observe.passes.executed_graph import Call, ExecutedGraph
from bnlab.observe.pruned_channels import pruned_inputs

__all__ = ["executions"]

_SATURATING = {torch.sigmoid: "sigmoid", Tensor.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
              torch.tanh: "tanh", Tensor.tanh: "tanh", F.tanh: "tanh"}  # fmt: skip
_MAX_CALLS_UPSTREAM = 64
"""Number of calls upstream of a BN layer that are searched for dropout."""


def executions(
    model: nn.Module,
    graph: ExecutedGraph,
    layers: Mapping[str, nn.Module],
    *,
    train_graph: ExecutedGraph | None = None,
) -> dict[str, Execution]:
    """Return what the graph shows about every layer that ran, in the order of their first calls.

    Args:
        model: The model.
        graph: The calls of a pass in eval mode.
        layers: The BN layers by path.
        train_graph: The calls of a pass in train mode, which may include dropout that eval mode never calls.
    """
    dropping = dropping_paths(model, graph, train_graph)
    names = [call.modules[-1] for call in graph.calls if call.function is None]
    modules = dict(model.named_modules())
    pruned = pruned_inputs(modules, graph, layers)
    features = feature_axes(model, graph, layers)
    return {
        name: replace(
            _execution(modules, graph, name),
            dropout=_dropout_upstream(modules, graph if train_graph is None else train_graph, name, dropping),
            pruned=pruned.get(name),
            features=features.get(name),
        )
        for name in dict.fromkeys(names)
        if name in layers and all(call.inputs for call in graph.of_layer(name))
    }


def _execution(modules: Mapping[str, nn.Module], graph: ExecutedGraph, name: str) -> Execution:
    calls = graph.of_layer(name)
    inputs = [call.inputs[0] for call in calls]
    channels = channels_of(modules[name])
    return Execution(
        calls=len(calls),
        samples=inputs[0].shape[0],
        counts=tuple(torch.Size(value.shape).numel() // channels for value in inputs),
        producer=_producer(modules, graph, calls[0]),
        activation=_activation_after(graph, calls[0]),
    )


def _producer(modules: Mapping[str, nn.Module], graph: ExecutedGraph, call: Call) -> Producer | None:
    before = graph.producer(call.inputs[0].id)
    if before is None or not before.modules:
        return None
    module = modules[before.modules[-1]]
    if not isinstance(module, FILTERING):
        return None
    rank = len(call.inputs[0].shape)
    bias: object = module.bias
    same_axis = rank == 2 or not isinstance(module, nn.Linear)
    norms = filter_norms(module) if same_axis else None
    return Producer(
        name=before.modules[-1],
        has_bias=bias is not None,
        feeds_only_this=len(graph.consumers(call.inputs[0].id)) == 1 and call.inputs[0].id not in graph.kept,
        same_axis=same_axis,
        filter_norms=norms if norms is not None and len(norms) == channels_of(modules[call.modules[-1]]) else None,
    )


def _dropout_upstream(
    modules: Mapping[str, nn.Module], graph: ExecutedGraph, name: str, dropping: Collection[str]
) -> str | None:
    """Return the path of a module that drops values on the way to the layer, with no other BN in between."""
    waiting, seen = [value.id for call in graph.of_layer(name)[:1] for value in call.inputs[:1]], set[int]()
    while waiting and len(seen) < _MAX_CALLS_UPSTREAM:
        value = waiting.pop()
        before = graph.producer(value)
        if before is None or value in seen or before.function is None:
            continue
        seen.add(value)
        path = dropping_call(modules, before)
        if path is not None and path in dropping:
            return path
        waiting += [value.id for value in before.inputs]
    return None


def _activation_after(graph: ExecutedGraph, call: Call) -> str | None:
    names: Iterable[str | None] = (
        _SATURATING.get(after.function) for after in graph.consumers(call.outputs[0].id) if after.function is not None
    )
    return next((name for name in names if name is not None), None)
