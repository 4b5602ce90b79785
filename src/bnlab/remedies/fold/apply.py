"""Applies a fold plan to a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bnlab.functional.folding import fold_into_consumer, fold_into_producer
from bnlab.functional.moments import widened
from bnlab.observe.passes.tensors import tensors_in
from bnlab.remedies.fold.hosts import is_transposed
from bnlab.remedies.fold.layer import Folding
from bnlab.remedies.fold.plan import Group

__all__ = ["copied", "fold_group", "replace_in_place"]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model.

    Tensors with an autograd history, such as a pruned weight, cannot be deep-copied. The copy gets their values.
    """
    tensors = [value for module in model.modules() for value in tensors_in(_attributes(module))]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    return copy.deepcopy(model, memo)


def _attributes(module: nn.Module) -> list[object]:
    containers = ("_parameters", "_buffers", "_modules")
    return [value for name, value in vars(module).items() if name not in containers]


def fold_group(model: nn.Module, group: Group, foldings: Mapping[str, Folding]) -> Callable[[], None] | None:
    """Fold the BN layers of a group into the weight and bias of its linear layer.

    The computation is in float64 and is rounded once. The layer gets new parameters. A layer that shares the old ones
    keeps them.

    Returns:
        A function that undoes the fold. If the result is not finite in the dtype of the weight, nothing is changed and
        None is returned.
    """
    host = model.get_submodule(group.host)
    old_weight, old_bias = _weight_and_bias(host)
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
    """Return the folded weight and bias in float64."""
    groups = getattr(host, "groups", 1)
    weight, bias = (None if tensor is None else widened(tensor.detach()) for tensor in _weight_and_bias(host))
    assert weight is not None
    for path in group.before:
        folding = foldings[path]
        weight, bias = fold_into_consumer(folding.scale, folding.shift, weight, bias, groups=groups)
    for path in group.after:
        folding = foldings[path]
        weight, bias = fold_into_producer(
            folding.scale, folding.shift, weight, bias, transposed=is_transposed(host), groups=groups
        )
    assert bias is not None  # a group has at least one BN layer
    return weight, bias


def _weight_and_bias(host: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = host._parameters["weight"], host._parameters["bias"]  # noqa: SLF001 - the plan checked that they exist
    assert weight is not None
    return weight, bias


def replace_in_place(layer: nn.Module, replacement: nn.Module | None) -> None:
    """Turn a BN layer into another module in place, so every list and every name that refers to it stays valid.

    Args:
        layer: A BN layer of the copied model.
        replacement: The module whose class and attributes the layer gets; an Identity if None.
    """
    new = (nn.Identity() if replacement is None else copy.copy(replacement)).eval()
    vars(layer).clear()
    layer.__class__ = type(new)
    vars(layer).update(vars(new))
