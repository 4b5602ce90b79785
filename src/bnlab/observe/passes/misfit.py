"""Says why a batch does not fit the forward of a model, and which `forward=` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor, nn

from bnlab.observe.passes.signatures import required

__all__ = ["described", "misfit"]

_MAX_ITEMS = 6
_MAX_DEPTH = 3


def misfit(model: nn.Module, batch: Any, signature: Signature | None) -> str:  # noqa: ANN401
    """Return an error message with the structure of a batch, the signature of forward, and the `forward=` to pass.

    Args:
        model: The model.
        batch: A batch that does not fit.
        signature: The signature of its forward; None where it cannot be read.
    """
    shown = "forward" if signature is None else f"forward{_without_annotations(signature)}"
    return (
        f"{type(model).__name__}: a batch must fit {shown}, got {described(batch)}. "
        f"Pass forward={_suggestion(batch, signature)}."
    )


def described(value: Any, depth: int = 0) -> str:  # noqa: ANN401 - a batch may be anything
    """Return the structure of a batch, such as ``{"image": float32 (8, 3, 32, 32), "name": [8 of str]}``."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        items = [f"{_key(key)}: {described(part, depth + 1)}" for key, part in _first(value.items())]
        text = _joined(items, len(value), depth)
        return f"{{{text}}}" if type(value) is dict else f"{type(value).__name__}({{{text}}})"
    if isinstance(value, (tuple, list)):
        return _described_sequence(value, depth)
    return "None" if value is None else type(value).__name__


def _described_sequence(value: Any, depth: int) -> str:  # noqa: ANN401
    kinds = {type(part) for part in value}
    has_structure = any(isinstance(part, (Tensor, Mapping, tuple, list)) for part in value)
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


def _suggestion(batch: Any, signature: Signature | None) -> str:  # noqa: ANN401
    """Return a lambda that calls the model with parts of the batch, as far as their names and order tell which."""
    parts = list(_parts(batch, "batch"))
    by_name = {name: path for name, path in parts if name}
    wanted = required(signature) if signature is not None else []
    left = [path for name, path in parts if name not in {one.name for one in wanted}]
    arguments = []
    for one in wanted:
        path = by_name.get(one.name) or (left.pop(0) if left else "...")
        arguments.append(f"{one.name}={path}" if one.kind is Parameter.KEYWORD_ONLY else path)
    return f"lambda model, batch: model({', '.join(arguments) or next(iter(left), '...')})"


def _parts(value: Any, path: str, name: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yield the name and the expression of every tensor in a batch, those of floating point first."""
    tensors = sorted(_tensors(value, path, name), key=lambda part: not part[2])
    yield from ((name, path) for name, path, _ in tensors)


def _tensors(value: Any, path: str, name: str) -> Iterator[tuple[str, str, bool]]:  # noqa: ANN401
    if isinstance(value, Tensor):
        yield name, path, value.is_floating_point() and value.dim() > 1
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{path}[{_key(key)}]", str(key))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value[:_MAX_ITEMS]):
            yield from _tensors(part, f"{path}[{index}]", "")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for key, part in vars(value).items():
            if isinstance(part, Tensor):
                yield from _tensors(part, f"{path}.{key}", key)
