"""Which BN layer of a model goes where, read from one run."""

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
    """A linear layer and the BN layers that go into it.

    Attributes:
        host: Path of the convolution or linear layer.
        before: Paths of the BN layers that feed it.
        after: Paths of those it feeds, in order; only the last may have an activation.
    """

    host: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @property
    def path(self) -> list[str]:
        """The paths of all of them, in the order in which they run."""
        return [*self.before, self.host, *self.after]

    @property
    def layers(self) -> list[str]:
        """The paths of the BN layers."""
        return [*self.before, *self.after]


@dataclass
class FoldPlan:
    """What is to become of each BN layer.

    Attributes:
        foldings: The numbers of every layer that can be replaced.
        dtypes: Of the inputs of these layers.
        groups: By path of the linear layer.
        affine: Why a layer becomes a scale and shift of its own, by path.
        left_alone: Why a layer stays, by path.
    """

    foldings: dict[str, Folding] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    affine: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)


def plan_of(model: nn.Module, graph: ExecutedGraph, layers: Mapping[str, nn.Module]) -> FoldPlan:
    """Decide for every BN layer whether it goes into what feeds it, into what it feeds, or becomes a scale and shift.

    Args:
        model: The model that ran, in eval mode.
        graph: What happened.
        layers: The BN layers by path.
    """
    plan, hosts = FoldPlan(), Hosts(model, graph)
    passed_on: dict[int, Value] = {}
    ran = dict.fromkeys(call.modules[-1] for call in graph.calls if call.function is None)
    for path in [*(name for name in ran if name in layers), *(name for name in layers if name not in ran)]:
        calls = graph.of_layer(path)
        folding = attempted(partial(_folding, layers[path], path, graph))
        if isinstance(folding, Refusal):
            plan.left_alone[path] = folding.reason
            continue
        plan.foldings[path], plan.dtypes[path] = folding, calls[0].inputs[0].dtype
        _place(plan, hosts, path, calls, passed_on)
    return plan


def _place(plan: FoldPlan, hosts: Hosts, path: str, calls: list[Call], passed_on: dict[int, Value]) -> None:
    """Put a layer in its place.

    Args:
        plan: Gets the layer.
        hosts: The linear layers.
        path: Of the layer.
        calls: Of the layer.
        passed_on: For the output of a layer without activation that was folded already: the value that the linear
            layer gives, from which its number differs only by that layer. Gets this one.
    """
    if len(calls) > 1:
        plan.affine[path] = f"it runs {len(calls)} times in one forward pass"
        return
    (call,) = calls
    given, output = call.inputs[0], call.outputs[0]
    feeding = hosts.feeding(passed_on.get(given.id, given))
    if isinstance(feeding, str) and hosts.used_elsewhere(given, call):
        feeding = Refusal(f"the output of {feeding} is used elsewhere too")
    if isinstance(feeding, str):
        plan.groups.setdefault(feeding, Group(feeding)).after.append(path)
        if plan.foldings[path].activation is None:
            passed_on[output.id] = passed_on.get(given.id, given)
        return
    has_activation = plan.foldings[path].activation is not None
    fed = Refusal("it has an activation") if has_activation else hosts.fed(output, call)
    if isinstance(fed, str):
        plan.groups.setdefault(fed, Group(fed)).before.append(path)
    else:
        plan.affine[path] = f"{feeding.reason}; {fed.reason}"


def _folding(layer: nn.Module, path: str, graph: ExecutedGraph) -> Folding:
    """Return y = activation(scale*x + shift) for a layer that nothing but its output is used of."""
    calls = graph.of_layer(path)
    if not calls:
        raise Refusal("it did not run on the example")
    if has_hooks(layer):
        raise Refusal("hooks look at it")
    for call in calls:
        if len(call.inputs) != 1 or len(call.outputs) != 1:
            raise Refusal("it is called with more than its input, such as a residual or a mask")
        given, output = call.inputs[0], call.outputs[0]
        if given.shape != output.shape or given.dtype != output.dtype or len(given.shape) < 2:
            raise Refusal(f"it makes {tuple(output.shape)}, {output.dtype} of {tuple(given.shape)}, {given.dtype}")
    for name, number in graph.tensors.items():
        own = name.startswith(f"{path}.") or not path
        if own and (graph.consumers(number) or number in graph.kept):
            raise Refusal(f"its {name.removeprefix(f'{path}.')} is used outside it")
    return folding_of(layer, len(calls[0].inputs[0].shape) - 2)
