"""Registration of operators with torch.library, which may be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

__all__ = ["define", "fresh_library"]

_KEPT = "_bnlab_registrations"


def fresh_library(namespace: str) -> Library:
    """Return an empty library of torch.library for a namespace of bnlab, and drop what bnlab registered there before.

    An import that was interrupted or repeated leaves registrations whose functions belong to modules that are gone.
    torch keeps the namespace as long as the process lives, so this function stores the library there.
    """
    operators = getattr(torch.ops, namespace)
    before: Library | None = vars(operators).get(_KEPT)
    if before is not None:
        before._destroy()  # type: ignore[no-untyped-call] # noqa: SLF001 - torch unregisters in no other way
    library = Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    setattr(operators, _KEPT, library)
    return library


def define(
    library: Library,
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    device: str | tuple[str, ...] = "default",
) -> None:
    """Register an operator.

    Args:
        library: The result of `fresh_library`.
        name: The name with its namespace, such as "bnlab::batch_norm_train".
        schema: The arguments and results of the operator.
        kernel: The function that computes the operator.
        fake: The function that returns the shapes, dtypes and strides of the results.
        device: The devices of the kernel, as in torch.library.impl.
    """
    torch.library.define(name, schema, lib=library)
    torch.library.impl(name, device, kernel, lib=library)
    torch.library.register_fake(name, fake, lib=library)
