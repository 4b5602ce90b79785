"""Compares what a BN layer computes in eval mode with the formula of BN, where its class has its own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.functional.activations import ACTIVATIONS
from bnlab.observe.passes.population import has_own_forward

__all__ = ["OwnFormulas"]

_TOLERANCE = 0.02
"""Largest difference from the formula, in standard deviations of the output, that half precision explains."""

_OTHER_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.mish,
    F.selu,
    F.softplus,
    F.hardsigmoid,
    F.hardtanh,
    F.softsign,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.prelu(x, x.new_tensor(0.25)),
)
"""Activations that layers of other libraries apply after BN, besides those in `ACTIVATIONS`."""


class OwnFormulas:
    """Finds the layers whose output in eval mode is not that of BN and a known activation.

    Args:
        layers: BN layers by path. Only those with their own forward are compared.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = {
            path: layer
            for path, layer in layers.items()
            if isinstance(layer, _BatchNorm) and has_own_forward(layer) and layer.running_mean is not None
        }
        self._inputs: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record an input of each layer inside the block."""
        handles = [layer.register_forward_pre_hook(self._recording(path)) for path, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def differences(self) -> dict[str, float]:
        """Run the layers on their inputs in eval mode, and return those with another formula, by path.

        Each layer also runs with other statistics, because a formula that ignores the mean is BN while the mean is 0.

        Returns:
            The largest difference of each layer, in standard deviations of the output.
        """
        compared = {path: _largest_difference(self._layers[path], x) for path, x in self._inputs.items()}
        return {path: difference for path, difference in compared.items() if difference > _TOLERANCE}

    def reasons(self) -> dict[str, str]:
        """Return why each of these layers is no BN, as the end of a sentence that begins with "it"."""
        return {path: f"is of {_kind(self._layers[path])}" for path in self.differences()}

    def _recording(self, path: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def record(_: nn.Module, arguments: tuple[object, ...]) -> None:
            if len(arguments) == 1 and isinstance(x := arguments[0], Tensor) and x.is_floating_point():
                self._inputs.setdefault(path, x.detach().clone())

        return record


def _kind(layer: _BatchNorm) -> str:
    kind = type(layer)
    base = next(cls for cls in kind.__mro__ if cls.__module__.startswith(("torch.", "bnlab.")))
    own = f"a subclass of {base.__name__}" if base is not kind else "whose forward was replaced,"
    return (
        f"class {kind.__name__}, {own} whose output in eval mode is not "
        "(x - running_mean) / sqrt(running_var + eps) * weight + bias"
    )


def _affine(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return layer.weight, layer.bias  # type: ignore[return-value]


def _largest_difference(layer: _BatchNorm, x: Tensor) -> float:
    """Return the larger difference with the stored statistics and with other ones. The layer is in eval mode."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or x.dim() < 2 or x.size(1) != layer.num_features:
        return 0.0  # another layout, of which nothing is known
    stored = _difference(layer, x)
    try:
        layer.running_mean, layer.running_var = mean + var.abs().sqrt(), 2 * var
        return max(stored, _difference(layer, x))
    finally:
        layer.running_mean, layer.running_var = mean, var


def _difference(layer: _BatchNorm, x: Tensor) -> float:
    """Return the smallest difference from BN with any known activation, in standard deviations of the output of BN."""
    output = layer(x.clone())
    if not isinstance(output, Tensor) or output.shape != x.shape:
        return 0.0
    mean, var, weight, bias = (
        None if tensor is None else tensor.detach().to(torch.float64)
        for tensor in (layer.running_mean, layer.running_var, *_affine(layer))
    )
    plain = F.batch_norm(x.to(torch.float64), mean, var, weight, bias, eps=layer.eps)
    y = output.detach().to(torch.float64)
    if not bool(plain.isfinite().all()):
        return 0.0
    scale = plain.std().clamp(min=1e-12) if plain.numel() > 1 else plain.abs().clamp(min=1e-12)
    functions = [lambda x: x, *(form.function for form in ACTIVATIONS.values()), *_OTHER_ACTIVATIONS]
    return min(float(((function(plain) - y).abs().max() / scale).nan_to_num(nan=1e6)) for function in functions)
