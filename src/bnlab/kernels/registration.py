"""Registration of operators with torch.library, as often as it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

__all__ = ["define", "fresh_library"]

_KEPT = "_bnlab_registrations"


def fresh_library(namespace: str) -> Library:
    """Return a library of torch.library that holds what bnlab registers in a namespace, without what it held before.

    An import that was interrupted, or is done again, leaves registrations whose functions belong to modules that are
    gone. torch keeps the namespace for as long as the process lives, so the library that filled it is kept there.
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
    device: str = "default",
) -> None:
    """Register an operator.

    Args:
        library: Of `fresh_library`.
        name: Name with its namespace, such as "bnlab::batch_norm_train".
        schema: Its arguments and results.
        kernel: What it does.
        fake: What shapes, dtypes and strides it returns.
        device: The devices the kernel is for, as in torch.library.impl.
    """
    torch.library.define(name, schema, lib=library)
    torch.library.impl(name, device, kernel, lib=library)
    torch.library.register_fake(name, fake, lib=library)
