"""Recognises a BN layer of which a part is missing, as where a network lies in several files.

Half a layer is no other kind of layer: a file with a ``running_mean`` and no ``running_var`` would pass as a file
without BN, although its BN state is not known. The observation filters of reinforcement learning and the codebooks of
vector quantization have a ``running_mean`` or a ``running_var`` too, but never with what makes a BN layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.tensors import FLOATING, StoredTensor

__all__ = ["HalfLayer", "flat_parameters", "half_of"]

_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_FLAT = ("_flat_param", "flat_param")
_IS_FLAT = (
    "holds the weights of several layers without their names, as FSDP keeps them "
    "(save the model under StateDictType.FULL_STATE_DICT)"
)


@dataclass(frozen=True)
class HalfLayer:
    """What is missing in a BN layer.

    Attributes:
        reason: A phrase such as "has no running_var".
        is_certain: Whether its own tensors show that it is a BN layer. Otherwise the layers beside it decide.
    """

    reason: str
    is_certain: bool


def half_of(own: Mapping[str, Any], beside: Sequence[str]) -> HalfLayer | None:
    """Return what is missing in a layer; None if nothing is, or if it is no BN layer.

    Args:
        own: The tensors of the layer by the names that a BN layer has, of any kind.
        beside: The names of other tensors with the same prefix, which no BN layer has.
    """
    for key, value in own.items():
        if isinstance(value, SplitTensor):
            return HalfLayer(f"lacks {value.missing()} of {key}", is_certain=True)
    vectors = [key for key in _STATISTICS if _is_vector(own.get(key))]
    absent = [key for key in _STATISTICS if own.get(key) is None]
    if not vectors or (beside and _COUNTER not in own):
        return None
    if len(vectors) == len(_STATISTICS):
        return _of_two_sizes(own)
    if not absent:
        return None
    return HalfLayer(f"has no {absent[0]}", is_certain=_COUNTER in own or _has_weight(own))


def flat_parameters(mapping: Mapping[Any, Any]) -> Iterator[tuple[str, HalfLayer]]:
    """Yield the name of every tensor in which FSDP keeps the weights of several layers one behind the other."""
    for name, value in mapping.items():
        if isinstance(name, str) and name.endswith(_FLAT) and isinstance(value, (StoredTensor, SplitTensor)):
            yield name, HalfLayer(_IS_FLAT, is_certain=True)


def _of_two_sizes(own: Mapping[str, Any]) -> HalfLayer | None:
    mean, var = (own[key].shape[0] for key in _STATISTICS)
    if mean == var or not (_COUNTER in own or _has_weight(own)):
        return None
    return HalfLayer(f"has a running_mean of {mean} and a running_var of {var} values", is_certain=True)


def _has_weight(own: Mapping[str, Any]) -> bool:
    """Return whether the weight is one per channel."""
    shapes = [own[key].shape for key in _STATISTICS if _is_vector(own.get(key))]
    return _is_vector(own.get("weight")) and own["weight"].shape in shapes


def _is_vector(value: object) -> bool:
    is_floating = isinstance(value, StoredTensor) and value.dtype in FLOATING
    return is_floating and isinstance(value, StoredTensor) and len(value.shape) == 1 and value.shape[0] > 0
