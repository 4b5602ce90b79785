"""Plans into which layer each BN layer of a model is folded, from one run of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from bnlab.observe.passes.executed_graph import Call, ExecutedGraph, Value
from bnlab.remedies.convert.followers import has_hooks
from bnlab.remedies.fold.hosts import Hosts
from bnlab.remedies.fold.layer import Folding, folding_of
from bnlab.remedies.refusal import Refusal, attempted

__all__ = ["FoldPlan", "Group", "plan_of"]


@dataclass
class Group:
    """A linear layer and the BN layers that are folded into it.

    Attributes:
        host: The path of the convolution or linear layer.
        before: The paths of the BN layers that feed the host.
        after: The paths of the BN layers that the host feeds, in order. Only the last may have an activation.
    """

    host: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @property
    def path(self) -> list[str]:
        """The paths of the host and the BN layers, in the order in which they run."""
        return [*self.before, self.host, *self.after]

    @property
    def layers(self) -> list[str]:
        """The paths of the BN layers."""
        return [*self.before, *self.after]


@dataclass
class FoldPlan:
    """The plan for each BN layer of a model.

    Attributes:
        foldings: The scale, shift and activation of each layer that can be replaced, by path.
        dtypes: The input dtype of each of these layers, by path.
        groups: The groups by path of the linear layer.
        affine: The reasons why layers become a separate scale and shift, by path.
        left_alone: The reasons why layers stay as they are, by path.
    """

    foldings: dict[str, Folding] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    affine: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def plan_of(model: nn.Module, graph: ExecutedGraph, layers: Mapping[str, nn.Module]) -> FoldPlan:
    """Decide for every BN layer whether to fold it into the layer before it, the layer after it, or a scale and shift.

    Args:
        model: The model that ran, in eval mode.
        graph: The graph of the run.
        layers: The BN layers by path.
    """
    plan, hosts = FoldPlan(), Hosts(model, graph)
    linear_outputs: dict[int, Value] = {}
    ran = dict.fromkeys(call.modules[-1] for call in graph.calls if call.function is None)
    for path in [*(name for name in ran if name in layers), *(name for name in layers if name not in ran)]:
        calls = graph.of_layer(path)
        folding = attempted(partial(_folding, layers[path], path, graph))
        if isinstance(folding, Refusal):
            plan.left_alone[path] = folding.reason
            continue
        plan.foldings[path], plan.dtypes[path] = folding, calls[0].inputs[0].dtype
        _place(plan, hosts, path, calls, linear_outputs)
    return plan


def _place(plan: FoldPlan, hosts: Hosts, path: str, calls: list[Call], linear_outputs: dict[int, Value]) -> None:
    """Add a layer to the plan.

    Args:
        plan: The plan to which the layer is added.
        hosts: The linear layers.
        path: The path of the layer.
        calls: The calls of the layer.
        linear_outputs: The output of the linear layer, by the id of the output of each BN layer without activation that
            was folded into that linear layer. The output of this layer is added if it is folded so.
    """
    if len(calls) > 1:
        plan.affine[path] = f"it runs {len(calls)} times in one forward pass"
        return
    (call,) = calls
    source, output = call.inputs[0], call.outputs[0]
    producer = hosts.producer(linear_outputs.get(source.id, source))
    if isinstance(producer, str) and hosts.used_elsewhere(source, call):
        producer = Refusal(f"the output of {producer} is used elsewhere too")
    if isinstance(producer, str):
        plan.groups.setdefault(producer, Group(producer)).after.append(path)
        if plan.foldings[path].activation is None:
            linear_outputs[output.id] = linear_outputs.get(source.id, source)
        return
    has_activation = plan.foldings[path].activation is not None
    consumer = Refusal("it has an activation") if has_activation else hosts.consumer(output, call)
    if isinstance(consumer, str):
        plan.groups.setdefault(consumer, Group(consumer)).before.append(path)
    else:
        plan.affine[path] = f"{producer.reason}; {consumer.reason}"


def _folding(layer: nn.Module, path: str, graph: ExecutedGraph) -> Folding:
    """Return the scale, shift and activation of a layer of which only the output is used."""
    calls = graph.of_layer(path)
    if not calls:
        raise Refusal("it did not run on the example")
    if has_hooks(layer):
        raise Refusal("it has hooks")
    for call in calls:
        if len(call.inputs) != 1 or len(call.outputs) != 1:
            raise Refusal("it is called with more than its input, such as a residual or a mask")
        source, output = call.inputs[0], call.outputs[0]
        if source.shape != output.shape or source.dtype != output.dtype or len(source.shape) < 2:
            raise Refusal(f"it turns {tuple(source.shape)}, {source.dtype} into {tuple(output.shape)}, {output.dtype}")
    for name, number in graph.tensors.items():
        own = name.startswith(f"{path}.") or not path
        if own and (graph.consumers(number) or number in graph.kept):
            raise Refusal(f"its {name.removeprefix(f'{path}.')} is used outside it")
    return folding_of(layer, len(calls[0].inputs[0].shape) - 2)
