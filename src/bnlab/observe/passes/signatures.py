"""Reads the signature of the forward of a model, also behind wrappers such as DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import nn

from bnlab.observe.wrappers import wrapped

__all__ = ["accepts_any_keyword", "positional", "required", "signature_of"]

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def signature_of(model: nn.Module) -> Signature | None:
    """Return the signature of the forward of a model; None where it cannot be read, as of some compiled functions.

    A wrapper that hands its arguments on, such as DistributedDataParallel, DataParallel, a compiled model or a
    checkpoint wrapper, has the signature of the model inside.
    """
    seen: set[nn.Module] = set()
    while model not in seen:
        seen.add(model)
        signature = _signature(model)
        if signature is None or not all(one.kind in _VARIADIC for one in signature.parameters.values()):
            return signature
        inner = _wrapped(model)
        if inner is None:
            return signature
        model = inner
    return None


def positional(signature: Signature) -> list[Parameter]:
    """Return the parameters that may be passed by position."""
    return [one for one in signature.parameters.values() if one.kind in _POSITIONAL]


def required(signature: Signature) -> list[Parameter]:
    """Return the parameters without a default."""
    return [one for one in signature.parameters.values() if one.default is one.empty and one.kind not in _VARIADIC]


def accepts_any_keyword(signature: Signature) -> bool:
    """Return whether there is a `**kwargs`."""
    return any(one.kind is Parameter.VAR_KEYWORD for one in signature.parameters.values())


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the model that a wrapper calls: the one inside a wrapper of torch, or its only child."""
    children = list(model.children())
    inner = wrapped(model)
    return inner if inner is not None else children[0] if len(children) == 1 else None


def _signature(model: nn.Module) -> Signature | None:
    forward: Callable[..., Any] | None = getattr(model, "forward", None)
    try:
        if isinstance(model, torch.jit.ScriptModule):
            return _of_script(forward)
        return inspect.signature(forward)  # type: ignore[arg-type] # None raises a TypeError
    except Exception:  # a function in C, or a decorator whose attributes raise
        return None


def _of_script(forward: Any) -> Signature:  # noqa: ANN401 - torch does not publish its class
    """Return the signature of a scripted method, whose first argument is self."""
    arguments = forward.schema.arguments[1:]
    return Signature(
        [
            Parameter(
                argument.name,
                Parameter.KEYWORD_ONLY if argument.kwarg_only else Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else Parameter.empty,
            )
            for argument in arguments
        ]
    )
