"""The activations that may follow BN: one table of their names, functions, modules and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.errors import UsageError

__all__ = ["ACTIVATIONS", "Activation", "ActivationForm", "activation_function"]

Activation = Literal["relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh"]


@dataclass(frozen=True)
class ActivationForm:
    """An activation with torch's default parameters.

    Attributes:
        function: The function that applies the activation.
        module: Torch's module for the activation.
        kernel: The number of the activation in the compiled kernels, or None if they do not support it. 0 stands for
            no activation.
        slope: The slope of the activation below 0, for the kernels.
    """

    function: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    kernel: int | None = None
    slope: float = 0.0


ACTIVATIONS: dict[Activation, ActivationForm] = {
    "relu": ActivationForm(F.relu, nn.ReLU, kernel=1),
    "relu6": ActivationForm(F.relu6, nn.ReLU6),
    "leaky_relu": ActivationForm(F.leaky_relu, nn.LeakyReLU, kernel=2, slope=0.01),
    "elu": ActivationForm(F.elu, nn.ELU),
    "silu": ActivationForm(F.silu, nn.SiLU),
    "gelu": ActivationForm(F.gelu, nn.GELU),
    "hardswish": ActivationForm(F.hardswish, nn.Hardswish),
    "sigmoid": ActivationForm(torch.sigmoid, nn.Sigmoid),
    "tanh": ActivationForm(torch.tanh, nn.Tanh),
}


def activation_function(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function of this name.

    Raises:
        UsageError: If there is no activation of this name.
    """
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise UsageError(f"activation: name must be one of {', '.join(ACTIVATIONS)} or None, got {name!r}.")
    return ACTIVATIONS[name].function
