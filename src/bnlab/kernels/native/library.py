"""The compiled library: its path, and the reason if it cannot be used."""

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
"""The file that `python -m bnlab.kernels.native.build` makes."""

OPERATORS = ("train", "apply", "backward", "statistics")
"""The operators of the library, in the namespace `bnlab_native`. Their callers define the derivatives."""

_COMPILE = "python -m bnlab.kernels.native.build"


_LOADING = threading.Lock()


def unavailable() -> str | None:
    """Load the library on the first call. Return the reason if it cannot be used, or None.

    Only the first call reads `BNLAB_CPU` and `BNLAB_ISA`.
    """
    with _LOADING:
        return _load()


@cache
def _load() -> str | None:
    chosen = os.environ.get("BNLAB_CPU", "auto")
    if chosen in ("torch", "triton"):
        return f"BNLAB_CPU is set to {chosen}"
    if not LIBRARY.exists():
        return f"it is not compiled: {_COMPILE}"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"it does not load: {' '.join(str(error).split())}"
    if not instruction_set():
        chosen_set = os.environ.get("BNLAB_ISA")
        target = f"BNLAB_ISA={chosen_set}" if chosen_set else "this processor"
        return f"it is not compiled for {target}: {_COMPILE} --all"
    registered = fresh_library("bnlab_native")
    for name in OPERATORS:
        registered.impl(name, torch.library.fallthrough_kernel, "AutogradCPU")  # type: ignore[no-untyped-call]
    return None


def instruction_set() -> str:
    """Return the build that runs: "avx512", "avx2" or "baseline", or "" if none of the compiled builds can run."""
    ask = ctypes.CDLL(str(LIBRARY)).bnlab_instruction_set
    ask.restype = ctypes.c_char_p
    answer: bytes = ask()
    return answer.decode()
