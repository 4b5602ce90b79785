"""The compiled library: where it lies, and why it cannot be used where it cannot."""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from pathlib import Path

import torch

from bnlab.kernels.registration import fresh_library

__all__ = ["LIBRARY", "OPERATORS", "instruction_set", "unavailable"]

LIBRARY = Path(__file__).with_name("libbnlab_native.so")
"""What `python -m bnlab.kernels.native.build` makes."""

OPERATORS = ("train", "apply", "backward", "statistics")
"""Its operators, in the namespace `bnlab_native`; the functions around them differentiate, they do not."""

_COMPILE = "python -m bnlab.kernels.native.build"


_LOADING = threading.Lock()


def unavailable() -> str | None:
    """Load the library the first time it is needed; return why it cannot be used, or None.

    `BNLAB_CPU` and `BNLAB_ISA` are read then, and not again.
    """
    with _LOADING:
        return _load()


@cache
def _load() -> str | None:
    if os.environ.get("BNLAB_CPU", "auto") == "torch":
        return "BNLAB_CPU asks for torch"
    if not LIBRARY.exists():
        return f"it is not compiled: {_COMPILE}"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"it does not load: {' '.join(str(error).split())}"
    if not instruction_set():
        asked = os.environ.get("BNLAB_ISA")
        whom = f"BNLAB_ISA={asked}" if asked else "this processor"
        return f"it is not compiled for {whom}: {_COMPILE} --all"
    registered = fresh_library("bnlab_native")
    for name in OPERATORS:
        registered.impl(name, torch.library.fallthrough_kernel, "AutogradCPU")  # type: ignore[no-untyped-call]
    return None


def instruction_set() -> str:
    """Return "avx512", "avx2" or "baseline": the build that runs; "" if none that is compiled does."""
    ask = ctypes.CDLL(str(LIBRARY)).bnlab_instruction_set
    ask.restype = ctypes.c_char_p
    answer: bytes = ask()
    return answer.decode()
