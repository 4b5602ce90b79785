"""Says why a batch does not fit the forward of a model, or its dtype, and which `forward=` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.observe.passes.signatures import positional, required

__all__ = ["described", "misfit", "misfit_of_arguments", "misfit_of_dtype"]

_MAX_ITEMS = 6
_MAX_DEPTH = 3
_MAX_REASON = 120
_NAME_OF_BATCH = re.compile(r"(^|_)(batch|sample|data|example|item)$")


def misfit(model: nn.Module, batch: Any, signature: Signature | None) -> str:  # noqa: ANN401
    """Return an error message with the structure of a batch, the signature of forward, and the `forward=` to pass.

    Args:
        model: The model.
        batch: A batch that does not fit.
        signature: The signature of its forward; None where it cannot be read.
    """
    return _misfit(model, signature, described(batch), _suggestion(batch, signature))


def misfit_of_arguments(
    model: nn.Module,
    batch: Any,  # noqa: ANN401
    signature: Signature | None,
    passed: Sequence[Any],
    error: Exception,
) -> str | None:
    """Return an error message where forward raised because of what it got from a batch, and the `forward=` to pass.

    Two cases show. The error names the class of an argument, such as a dataclass or an array, where a tensor is needed.
    Or a parameter called `batch`, `sample` or `data` got one tensor of a batch that has more parts.

    Args:
        model: The model.
        batch: A batch on which forward raised.
        signature: The signature of its forward; None where it cannot be read.
        passed: The positional arguments that forward got.
        error: What it raised.

    Returns:
        The message; None in any other case.
    """
    if not isinstance(error, (TypeError, AttributeError, IndexError, KeyError, ValueError)):
        return None
    text = " ".join(f"{type(error).__name__}: {error}".split())
    got = f"{described(batch)} ({text[:_MAX_REASON]})"
    if any(_is_no_tensor(part, error) for part in passed):
        return _misfit(model, signature, got, _suggestion(batch, signature))
    first = next(iter(positional(signature)), None) if signature is not None else None
    if first is None or _NAME_OF_BATCH.search(first.name) is None or isinstance(batch, Tensor):
        return None
    is_part = len(passed) == 1 and isinstance(passed[0], Tensor)
    return _misfit(model, signature, got, "lambda model, batch: model(batch)") if is_part else None


def _is_no_tensor(value: object, error: Exception) -> bool:
    """Return whether an error says that a value is not the tensor that an operation needs."""
    kind = type(value)
    if isinstance(value, Tensor) or kind.__module__ == "builtins" or not isinstance(error, (TypeError, AttributeError)):
        return False
    is_named = re.search(rf"\b{re.escape(kind.__name__)}\b", str(error)) is not None
    return is_named and (isinstance(error, TypeError) or hasattr(Tensor, str(error.name)))


def _misfit(model: nn.Module, signature: Signature | None, got: str, suggestion: str) -> str:
    shown = "forward" if signature is None else f"forward{_without_annotations(signature)}"
    return f"{type(model).__name__}: a batch must fit {shown}, got {got}. Pass forward={suggestion}."


def misfit_of_dtype(model: nn.Module, batch: Any, signature: Signature | None) -> str | None:  # noqa: ANN401
    """Return an error message where a batch has another floating dtype than a model, and the `forward=` to pass.

    Args:
        model: The model, whose first floating parameter shows its dtype.
        batch: A batch on which forward raised.
        signature: The signature of its forward; None where it cannot be read.

    Returns:
        The message; None if the dtypes agree, or if the model or the batch has none.
    """
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
    others = [tensor.dtype for _, _, tensor in _tensors(batch, "batch", "") if tensor.is_floating_point()]
    if dtype is None or not others or others[0] == dtype:
        return None
    return (
        f"{type(model).__name__}: a batch must have the dtype of the model, {_name_of(dtype)}, got {described(batch)}. "
        f"Pass forward={_suggestion(batch, signature, dtype)}."
    )


def described(value: Any, depth: int = 0) -> str:  # noqa: ANN401 - a batch may be anything
    """Return the structure of a batch, such as ``{"image": float32 (8, 3, 32, 32), "name": [8 of str]}``."""
    if isinstance(value, Tensor):
        return f"{_name_of(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        items = [f"{_key(key)}: {described(part, depth + 1)}" for key, part in _first(value.items())]
        text = _joined(items, len(value), depth)
        return f"{{{text}}}" if type(value) is dict else f"{type(value).__name__}({{{text}}})"
    if isinstance(value, (tuple, list)):
        return _described_sequence(value, depth)
    if isinstance(value, np.ndarray):
        return f"ndarray {value.dtype} {value.shape}"
    if is_dataclass(value) and not isinstance(value, type):
        parts = vars(value) if hasattr(value, "__dict__") else {}
        items = [f"{name}={described(part, depth + 1)}" for name, part in _first(parts.items())]
        return f"{type(value).__name__}({_joined(items, len(parts), depth)})"
    return "None" if value is None else type(value).__name__


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described_sequence(value: Any, depth: int) -> str:  # noqa: ANN401
    kinds = {type(part) for part in value}
    has_structure = any(isinstance(part, (Tensor, np.ndarray, Mapping, tuple, list)) for part in value)
    if len(value) > 1 and len(kinds) == 1 and not has_structure:
        text = f"{len(value)} of {next(iter(kinds)).__name__}"
    else:
        text = _joined([described(part, depth + 1) for part in _first(value)], len(value), depth)
    if isinstance(value, list):
        return f"[{text}]"
    name = type(value).__name__ if hasattr(value, "_fields") else ""
    return f"{name}({text}{',' if len(value) == 1 else ''})"


def _first(parts: Any) -> list[Any]:  # noqa: ANN401
    return [part for part, _ in zip(parts, range(_MAX_ITEMS), strict=False)]


def _joined(items: list[str], count: int, depth: int) -> str:
    if depth >= _MAX_DEPTH and items:
        return "..."
    return ", ".join(items + ["..."] * (count > len(items)))


def _key(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def _without_annotations(signature: Signature) -> str:
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(Signature(bare))


def _suggestion(batch: Any, signature: Signature | None, dtype: torch.dtype | None = None) -> str:  # noqa: ANN401
    """Return a lambda that calls the model with parts of the batch, as far as their names and order tell which.

    With a dtype, the parts of floating point are converted to it.
    """
    tensors = sorted(_tensors(batch, "batch", ""), key=lambda part: not _is_input(part[2]))
    parts = [
        (name, path if dtype is None or not tensor.is_floating_point() else f"{path}.to({dtype})")
        for name, path, tensor in tensors
    ]
    by_name = {name: path for name, path in parts if name}
    wanted = required(signature) if signature is not None else []
    left = [path for name, path in parts if name not in {one.name for one in wanted}]
    arguments = []
    for one in wanted:
        path = by_name.get(one.name) or (left.pop(0) if left else "...")
        arguments.append(f"{one.name}={path}" if one.kind is Parameter.KEYWORD_ONLY else path)
    return f"lambda model, batch: model({', '.join(arguments) or next(iter(left), '...')})"


def _is_input(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1


def _tensors(value: Any, path: str, name: str) -> Iterator[tuple[str, str, Tensor]]:  # noqa: ANN401
    """Yield the name, the expression and the value of every tensor in a batch."""
    if isinstance(value, Tensor):
        yield name, path, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        yield name, f"torch.as_tensor({path})", torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{path}[{_key(key)}]", str(key))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value[:_MAX_ITEMS]):
            yield from _tensors(part, f"{path}[{index}]", "")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for key, part in vars(value).items():
            if isinstance(part, (Tensor, np.ndarray)):
                yield from _tensors(part, f"{path}.{key}", key)
