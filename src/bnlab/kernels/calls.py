"""The operators of the fused kernels for the device of a tensor."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from bnlab.kernels.backends.triton.availability import interprets
from bnlab.kernels.fused import Calls
from bnlab.kernels.native import calls as native

__all__ = ["calls_of"]


def calls_of(x: Tensor) -> Calls:
    """Return the operators for the device of a tensor: those of the CPU kernels, or of the GPU kernels."""
    return _on_cpu() if x.is_cpu else _on_gpu()


@cache
def _on_cpu() -> Calls:
    return _on_gpu() if interprets() else native


@cache
def _on_gpu() -> Calls:
    from bnlab.kernels.backends.triton import calls

    return calls
