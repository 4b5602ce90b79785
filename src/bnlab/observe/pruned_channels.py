"""Recognises pruned channels: their values do not depend on the input, because all weights that compute them are 0."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.observe.discover import channels_of
from bnlab.observe.evidence import Masks, Pruned
from bnlab.observe.filter_norms import FILTERING, links_by_output
from bnlab.observe.passes.executed_graph import Call, ExecutedGraph

__all__ = ["pruned_inputs", "zero_outputs"]


_LINEAR_MAPS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__, torch.sub, Tensor.sub,
         Tensor.sub_, Tensor.__sub__, Tensor.__isub__}  # fmt: skip
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_CHANNELWISE = {
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish,
    F.hardtanh, F.hardswish, F.hardsigmoid, F.softplus, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh,
    Tensor.tanh, F.tanh, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.interpolate, torch.clamp, Tensor.clamp, Tensor.contiguous, Tensor.clone,
}  # fmt: skip
"""Functions that map each channel on its own, so that a channel without data stays one."""


def pruned_inputs(modules: Mapping[str, nn.Module], graph: ExecutedGraph, layers: Collection[str]) -> dict[str, Pruned]:
    """Return the channels of each layer that are pruned at every call; no entry for a layer without any.

    A channel is pruned where each weight of its convolution or linear layer is 0 or reads a pruned channel. It stays
    pruned behind BN, activations and pooling, in a concatenation, and in the sum with another pruned channel. Channels
    are on axis 1.

    Args:
        modules: The modules of the model by path.
        graph: The calls of a pass.
        layers: The paths of the layers.
    """
    pruned: dict[int, Pruned] = {}
    inputs: dict[str, list[Pruned | None]] = {}
    for call in graph.calls:
        before = [pruned.get(value.id) for value in call.inputs]
        if call.function is None and before:
            on_axis_1 = call.inputs[0].shape[1:2] == (channels_of(modules[call.modules[-1]]),)
            inputs.setdefault(call.modules[-1], []).append(before[0] if on_axis_1 else None)
        after = _after(modules, call, before)
        if after is not None and after.channels:
            pruned[call.outputs[0].id] = after
    common = {name: _common(inputs[name]) for name in layers if name in inputs}
    return {name: both for name, both in common.items() if both is not None and both.channels}


def zero_outputs(module: nn.Module, pruned_inputs: Masks | None = None) -> Masks:
    """Return the output channels of a convolution or linear layer that no weight other than 0 connects to the input.

    Args:
        module: The layer. Its `weight` has the shape (out, in / groups, *kernel), or (in, out / groups, *kernel) for a
            transposed convolution.
        pruned_inputs: The input channels that count as not connected, shape (in,); None for none.

    Returns:
        Shape (out,).
    """
    weight: Any = module.weight
    is_used = weight.detach() != 0
    links = links_by_output(module, is_used.flatten(2).any(2) if is_used.dim() > 2 else is_used)
    if pruned_inputs is not None:
        links = links & ~pruned_inputs.reshape(len(links), 1, -1)
    return np.asarray(~links.any(2)).reshape(-1)


def _after(modules: Mapping[str, nn.Module], call: Call, before: Sequence[Pruned | None]) -> Pruned | None:
    """Return the pruned channels of the output of a call, from those of its inputs."""
    output = call.outputs[0]
    if call.function in _LINEAR_MAPS:
        return _after_weights(modules, call, before[0])
    if not any(before) or len(output.shape) < 2:
        return None
    if call.function is None or call.function in _CHANNELWISE:
        return before[0] if call.inputs[0].shape[:2] == output.shape[:2] else None
    if call.function in _SUMS:
        return _common(before) if all(value.shape == output.shape for value in call.inputs) else None
    if call.function in _CONCATENATIONS and _axis(call) in (1, 1 - len(output.shape)):
        return _side_by_side([value.shape[1] for value in call.inputs], before)
    return None


def _after_weights(modules: Mapping[str, nn.Module], call: Call, before: Pruned | None) -> Pruned | None:
    module = modules.get(call.modules[-1]) if call.modules else None
    weight: object = getattr(module, "weight", None)
    if not isinstance(module, FILTERING) or type(weight) not in (Tensor, nn.Parameter):  # quantised weights have others
        return None
    assert isinstance(weight, Tensor)
    if weight.is_meta:  # accelerate keeps its values elsewhere
        return None
    x, output = call.inputs[0], call.outputs[0]
    if len(output.shape) != weight.dim():  # an input without a batch, or a linear layer on the last of several axes
        return None
    own = zero_outputs(module)
    if len(own) != output.shape[1]:
        return None
    if before is None:
        return Pruned.of(own, (call.modules[-1],))
    all_zero = zero_outputs(module, before.mask(x.shape[1]))
    names = ((call.modules[-1],) if own.any() else ()) + (before.producers if (all_zero & ~own).any() else ())
    return Pruned.of(all_zero, names)


def _common(values: Sequence[Pruned | None]) -> Pruned | None:
    """Return the channels that are pruned in every one of some values."""
    pruned = [value for value in values if value is not None]
    if len(pruned) < len(values):
        return None
    channels = set(pruned[0].channels).intersection(*(value.channels for value in pruned[1:]))
    names = dict.fromkeys(name for value in pruned for name in value.producers)
    return Pruned(tuple(sorted(channels)), tuple(names))


def _side_by_side(widths: Sequence[int], before: Sequence[Pruned | None]) -> Pruned:
    """Return the pruned channels of concatenated values with these numbers of channels."""
    channels: list[int] = []
    names: list[str] = []
    start = 0
    for width, pruned in zip(widths, before, strict=True):
        if pruned is not None:
            channels += [start + channel for channel in pruned.channels]
            names += pruned.producers
        start += width
    return Pruned(tuple(channels), tuple(dict.fromkeys(names)))


def _axis(call: Call) -> object:
    """Return the axis of a concatenation."""
    return call.keywords.get("dim", call.keywords.get("axis", call.arguments[1] if len(call.arguments) > 1 else 0))
