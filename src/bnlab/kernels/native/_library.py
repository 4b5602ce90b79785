"""The compiled library: where it lies, and why it is not there where it is not."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

__all__ = ["LIBRARY", "OPERATORS", "unavailable"]

LIBRARY = Path(__file__).with_name("libbnlab_native.so")
"""What `python -m bnlab.kernels.native.build` makes."""

OPERATORS = ("train", "apply", "backward", "statistics")
"""Its operators, in the namespace `bnlab_native`; the functions around them differentiate, they do not."""

_REGISTERED = torch.library.Library("bnlab_native", "FRAGMENT")  # type: ignore[no-untyped-call]


@cache
def unavailable() -> str | None:
    """Load the library once, which registers its operators; return why it cannot be used, or None."""
    if os.environ.get("BNLAB_CPU", "auto") == "torch":
        return "BNLAB_CPU asks for torch"
    if not LIBRARY.exists():
        return "it is not compiled: python -m bnlab.kernels.native.build"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"it does not load: {' '.join(str(error).split())}"
    for name in OPERATORS:
        _REGISTERED.impl(name, torch.library.fallthrough_kernel, "AutogradCPU")  # type: ignore[no-untyped-call]
    return None
