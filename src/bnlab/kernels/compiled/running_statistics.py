"""Operators that read the running statistics before a forward pass updates them.

A compiler would compute ordinary operations again in the backward pass, from running statistics that have changed since
the forward pass. It computes a custom operator once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from bnlab.functional import renorm
from bnlab.kernels.compiled.sharding import replicated_like
from bnlab.kernels.registration import define
from bnlab.kernels.request import needs_formulas

__all__ = ["copied", "register", "renorm_correction"]


def register(library: Library) -> None:
    """Register the operators of this module."""
    define(
        library,
        "bnlab::renorm_correction",
        "(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, Tensor limits, float eps)"
        " -> (Tensor r, Tensor d)",
        renorm.renorm_correction,
        _fake_renorm_correction,
    )
    define(library, "bnlab::copied", "(Tensor x) -> Tensor", torch.clone, torch.empty_like)


def renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return r and d as `functional.renorm_correction` does, without gradient."""
    with torch.no_grad():
        if needs_formulas():
            return renorm.renorm_correction(mean, var, running_mean, running_var, limits, eps)
        limits = replicated_like(limits, mean)
        r, d = torch.ops.bnlab.renorm_correction(mean, var, running_mean, running_var, limits, eps)
    return r, d


def copied(x: Tensor) -> Tensor:
    """Return a copy, which a compiler makes once, in the forward pass."""
    result: Tensor = x.clone() if needs_formulas() else torch.ops.bnlab.copied(x)
    return result


def _fake_renorm_correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)
