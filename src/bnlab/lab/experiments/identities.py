"""identities: the equations that the forward and backward pass of BN must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnlab.nn
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "Identities"]

_EXACT = 1e-10
_FLOOR = 1e-18
_NO_EPS = 1e-30
_IOFFE = "Ioffe and Szegedy 2015, section 3"


@dataclass(frozen=True)
class Config:
    """Settings of identities.

    Attributes:
        values: The number of values per channel.
        channels: The number of channels of BN.
        inputs: The number of inputs of the linear layer in front.
        factor: The factor that scales the weight of this layer.
        deviations: The standard deviations of the input at which the effect of eps is measured.
    """

    values: int = 64
    channels: int = 16
    inputs: int = 8
    factor: float = 37.0
    deviations: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


def _equation(key: str, text: str, source: str, refuted_if: str) -> Claim:
    return Claim(
        key=key,
        text=text,
        source=source,
        number="largest error over the size of the terms, float64",
        unit="fraction",
        low=0.0,
        high=_EXACT,
        tolerance="float64 rounds to 1e-16, times the terms of a sum and the condition number of the variance",
        refuted_if=refuted_if,
    )


class Identities(Experiment[Config]):
    """The equations that the forward and backward pass of BN must satisfy."""

    name = "identities"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3; Santurkar et al. 2018 (arXiv 1805.11604)"
    quick = Config()
    full = Config(values=4096, channels=256, inputs=128)
    claims = (
        _equation("sum", "the gradient of the input sums to 0 over a channel", _IOFFE, "the mean were held constant"),
        _equation(
            "orthogonal",
            "the gradient of the input is orthogonal to the input, in the limit of eps = 0",
            "Ioffe 2017, section 3",
            "the variance were held constant",
        ),
        Claim(
            key="eps",
            text="the gradient of the input is also orthogonal to the input with eps 1e-5",
            source="bnlab",
            number="largest inner product over the size of its terms, both layers, by standard deviation of the input",
            unit="fraction",
            low=0.0,
            high=1e-3,
            tolerance="the remaining inner product is at most eps over the variance",
            refuted_if="eps made a difference at every size of the input",
        ),
        _equation(
            "backward",
            "dx = gamma / (m sqrt(var + eps)) * (m dy - sum dy - xhat * sum(dy * xhat)), with eps 1e-5",
            _IOFFE,
            "autograd gave another gradient",
        ),
        _equation("dgamma", "the gradient of gamma is sum(dy * xhat)", _IOFFE, "autograd gave another gradient"),
        _equation("dbeta", "the gradient of beta is sum(dy)", _IOFFE, "autograd gave another gradient"),
        _equation(
            "scale",
            "BN((aW)u) = BN(Wu), in the limit of eps = 0",
            "Ioffe and Szegedy 2015, section 3.3",
            "the scale of the weight reached the output",
        ),
        _equation(
            "scale-input",
            "the gradient of u is the same for aW and W",
            "Ioffe and Szegedy 2015, section 3.3",
            "the scale of the weight reached the gradient of the input",
        ),
        _equation(
            "scale-weight",
            "the gradient of aW is 1/a times that of W",
            "Ioffe and Szegedy 2015, section 3.3",
            "larger weights did not get smaller gradients",
        ),
        _equation(
            "euler",
            "<W, dW> = 0 for every output channel, in the limit of eps = 0",
            "Euler's theorem on homogeneous functions, by the scale invariance",
            "the gradient changed the length of the weight",
        ),
        _equation(
            "santurkar",
            "|dx|^2 = gamma^2 / var * (|g|^2 - (sum g)^2 / m - (sum g * xhat)^2 / m), g the gradient of the output",
            "Santurkar et al. 2018, theorem 4.1, as an identity",
            "BN did not remove the mean and the part along xhat from the gradient",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Evaluate both sides of each equation for torch's layer and bnlab's layer, with random inputs in float64."""
        errors: dict[str, dict[str, float]] = {}
        layers = {"torch": nn.BatchNorm1d, "bnlab": bnlab.nn.BatchNorm1d}
        for index, (name, layer_class) in enumerate(layers.items()):
            generator = torch.Generator().manual_seed(seed)
            for key, error in (
                *_backward(layer_class, config, generator).items(),
                *_scaling(layer_class, config, generator).items(),
            ):
                errors.setdefault(key, {})[name] = error
            for deviation in config.deviations:
                one = _Pass.of(layer_class, config, generator, eps=1e-5, deviation=deviation)
                by_deviation = errors.setdefault("eps", {})
                by_deviation[f"{deviation:g}"] = max(_orthogonal(one), by_deviation.get(f"{deviation:g}", 0.0))
            tick((index + 1) / len(layers))
        exact = [claim.key for claim in self.claims if claim.key != "eps"]
        return Observation(
            values={claim.key: errors[claim.key] for claim in self.claims},
            table={
                "equation": [key for key in exact for _ in layers],
                "layer": [name for _ in exact for name in layers],
                "error": [max(errors[key][name], _FLOOR) for key in exact for name in layers],
            },
            notes=("All values are float64. The seeds differ in the inputs, weights and gradients.",),
        )

    def figure(self) -> Figure:
        """Draw the error of each equation, with a shape per layer."""
        return Figure(
            title="Relative error of the equations of BN in float64",
            mark=Mark.POINT,
            x=Axis("equation", "equation"),
            y=Axis("error", "relative error", log=True),
            series="layer",
            rules=(Rule("y", _EXACT, "largest that agrees"),),
        )


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass through a BN layer.

    Attributes:
        x: The input.
        dy: The gradient of the output.
        dx: The gradient of the input.
        xhat: The normalised input, by its definition.
        gamma: The weight of the layer.
        inv_std: 1 / sqrt(var + eps), by its definition.
        dgamma: The gradient of gamma.
        dbeta: The gradient of beta.
    """

    x: Tensor
    dy: Tensor
    dx: Tensor
    xhat: Tensor
    gamma: Tensor
    inv_std: Tensor
    dgamma: Tensor
    dbeta: Tensor

    @classmethod
    def of(
        cls,
        layer_class: Callable[..., nn.Module],
        config: Config,
        generator: torch.Generator,
        *,
        eps: float,
        deviation: float = 2.0,
    ) -> _Pass:
        """Send a random batch and a random gradient through a layer with random gamma and beta."""
        layer = _layer(layer_class, config.channels, eps, generator)
        x = deviation * (1 + _random((config.values, config.channels), generator))
        x.requires_grad_()
        dy = _random((config.values, config.channels), generator)
        gamma, beta = layer.get_parameter("weight"), layer.get_parameter("bias")
        dx, dgamma, dbeta = torch.autograd.grad(layer(x), (x, gamma, beta), dy)
        with torch.no_grad():
            centred = x - x.sum(0) / len(x)
            inv_std = 1 / (centred.square().sum(0) / len(x) + eps).sqrt()
            return cls(x.detach(), dy, dx, centred * inv_std, gamma.detach(), inv_std, dgamma, dbeta)


def _backward(layer_class: Callable[..., nn.Module], config: Config, generator: torch.Generator) -> dict[str, float]:
    one = _Pass.of(layer_class, config, generator, eps=1e-5)
    m = len(one.x)
    expected = one.gamma * one.inv_std / m * (m * one.dy - one.dy.sum(0) - one.xhat * (one.dy * one.xhat).sum(0))
    tiny = _Pass.of(layer_class, config, generator, eps=_NO_EPS)
    squares = tiny.dy.square().sum(0) - tiny.dy.sum(0).square() / m - (tiny.dy * tiny.xhat).sum(0).square() / m
    return {
        "sum": float((one.dx.sum(0).abs() / one.dx.abs().sum(0)).max()),
        "orthogonal": _orthogonal(tiny),
        "backward": _error(one.dx, expected),
        "dgamma": _error(one.dgamma, (one.dy * one.xhat).sum(0)),
        "dbeta": _error(one.dbeta, one.dy.sum(0)),
        "santurkar": _error(tiny.dx.square().sum(0), (tiny.gamma * tiny.inv_std).square() * squares),
    }


def _scaling(layer_class: Callable[..., nn.Module], config: Config, generator: torch.Generator) -> dict[str, float]:
    layer = _layer(layer_class, config.channels, _NO_EPS, generator)
    u = _random((config.values, config.inputs), generator).requires_grad_()
    dy = _random((config.values, config.channels), generator)
    weight = _random((config.channels, config.inputs), generator)
    passes = []
    for factor in (1.0, config.factor):
        scaled = (factor * weight).requires_grad_()
        y = layer(u @ scaled.T)
        passes.append((y.detach(), *torch.autograd.grad(y, (u, scaled), dy)))
    (y, du, dw), (y_scaled, du_scaled, dw_scaled) = passes
    return {
        "scale": _error(y_scaled, y),
        "scale-input": _error(du_scaled, du),
        "scale-weight": _error(dw_scaled, dw / config.factor),
        "euler": float(((weight * dw).sum(1).abs() / (weight * dw).abs().sum(1)).max()),
    }


def _layer(layer_class: Callable[..., nn.Module], channels: int, eps: float, generator: torch.Generator) -> nn.Module:
    layer = layer_class(channels, eps=eps, dtype=torch.float64).train()
    with torch.no_grad():
        layer.get_parameter("weight").copy_(0.5 + torch.rand(channels, generator=generator, dtype=torch.float64))
        layer.get_parameter("bias").copy_(_random((channels,), generator))
    return layer


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _orthogonal(one: _Pass) -> float:
    products = one.dx * one.x
    return float((products.sum(0).abs() / products.abs().sum(0)).max())


def _error(have: Tensor, expected: Tensor) -> float:
    return float((have - expected).abs().max() / expected.abs().max())
