"""The forms a batch may have, and how a model is called on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["model_input", "run_batch"]


def model_input(batch: Any) -> Any:  # noqa: ANN401 - a batch may be anything
    """Return what of a batch the model is called with: all of a tensor or dict, the first item of a tuple or list."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def run_batch(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """Call a model on one batch: a tensor, a tuple or list (input first), or a dict (passed as keywords)."""
    found = model_input(batch)
    return model(**found) if isinstance(found, Mapping) else model(found)


def tensors_in(value: Any) -> list[Tensor]:  # noqa: ANN401
    """Return every tensor in nested tuples, lists, dicts and dataclass-like objects, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list, set)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [tensor for item in vars(value).values() for tensor in tensors_in(item)] if _is_record(value) else []


def _is_record(value: object) -> bool:
    return hasattr(value, "__dataclass_fields__") and not isinstance(value, type)
