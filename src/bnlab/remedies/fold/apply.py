"""Carrying a plan out in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bnlab.functional.folding import fold_into_consumer, fold_into_producer
from bnlab.functional.moments import widened
from bnlab.observe.passes.batches import tensors_in
from bnlab.remedies.fold.hosts import is_transposed
from bnlab.remedies.fold.layer import Folding
from bnlab.remedies.fold.plan import Group

__all__ = ["copied", "fold_group", "stand_in"]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model.

    Tensors with a history, such as a pruned weight, cannot be copied with it: the copy gets their values.
    """
    held = [value for module in model.modules() for value in tensors_in(_attributes(module))]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    return copy.deepcopy(model, memo)


def _attributes(module: nn.Module) -> list[object]:
    containers = ("_parameters", "_buffers", "_modules")
    return [value for name, value in vars(module).items() if name not in containers]


def fold_group(model: nn.Module, group: Group, foldings: Mapping[str, Folding]) -> Callable[[], None] | None:
    """Give the linear layer of a group the weight and bias with its BN layers in them.

    All of it in float64, rounded once. The tensors are new ones: others that share the old keep them.

    Returns:
        What takes that back; None, with nothing done, if the result is not finite in the dtype of the weight.
    """
    host = model.get_submodule(group.host)
    old_weight, old_bias = _own(host)
    weight, bias = _folded(host, group, foldings)
    new_weight = torch.empty_like(old_weight.detach()).copy_(weight)  # keeps the strides
    new_bias = bias.to(new_weight.dtype if old_bias is None else old_bias.dtype)
    if not bool(new_weight.isfinite().all() and new_bias.isfinite().all()):
        return None
    wants_grad = old_weight.requires_grad
    host.weight = nn.Parameter(new_weight, requires_grad=wants_grad)
    host.bias = nn.Parameter(new_bias, requires_grad=wants_grad)

    def take_back() -> None:
        host.weight = old_weight
        host.register_parameter("bias", old_bias)

    return take_back


def _folded(host: nn.Module, group: Group, foldings: Mapping[str, Folding]) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float64."""
    groups = getattr(host, "groups", 1)
    weight, bias = (None if tensor is None else widened(tensor.detach()) for tensor in _own(host))
    assert weight is not None
    for path in group.before:
        found = foldings[path]
        weight, bias = fold_into_consumer(found.scale, found.shift, weight, bias, groups=groups)
    for path in group.after:
        found = foldings[path]
        weight, bias = fold_into_producer(
            found.scale, found.shift, weight, bias, transposed=is_transposed(host), groups=groups
        )
    assert bias is not None  # a group has at least one BN layer
    return weight, bias


def _own(host: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = host._parameters["weight"], host._parameters["bias"]  # noqa: SLF001 - the plan looked: they are there
    assert weight is not None
    return weight, bias


def stand_in(layer: nn.Module, replacement: nn.Module | None) -> None:
    """Turn a BN layer into another module, the same object: every list and name that holds it then holds that.

    Args:
        layer: Of the copy.
        replacement: Its attributes are taken over; an Identity if None.
    """
    new = (nn.Identity() if replacement is None else copy.copy(replacement)).eval()
    vars(layer).clear()
    layer.__class__ = type(new)
    vars(layer).update(vars(new))
