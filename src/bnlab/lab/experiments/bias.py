"""bias: whether a bias before BN has any effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import bnlab.nn
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Bias", "Config"]

_CASES = {
    "bias, affine": (True, True),
    "no bias, affine": (False, True),
    "bias, no affine": (True, False),
    "no bias, no affine": (False, False),
}
_TRAIN, _EVAL, _FROZEN = "train mode", "eval mode", "trained on frozen statistics"


@dataclass(frozen=True)
class Config:
    """Settings of bias.

    Attributes:
        samples: The size of the data set, which is one batch.
        features: The inputs of the linear layer.
        offset: The offset of the target, in standard deviations of the rest of the target.
        steps: The steps of Adam.
        learning_rate: The learning rate of Adam.
    """

    samples: int = 512
    features: int = 8
    offset: float = 3.0
    steps: int = 500
    learning_rate: float = 0.05


class Bias(Experiment[Config]):
    """A bias before BN has an effect only on frozen statistics and without affine parameters."""

    name = "bias"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.2"
    quick = Config()
    full = Config(samples=8192, features=64, steps=5000)
    claims = (
        Claim(
            key="matters",
            text="the bias before BN matters",
            source="a common objection to Ioffe and Szegedy 2015, section 3.2",
            number="loss without the bias minus loss with it, over offset squared",
            unit="fraction",
            low=0.1,
            high=2.0,
            tolerance="a bias that fits the offset saves 1, the whole offset; a bias without effect saves 0",
            refuted_if="the bias saved nothing in any case",
        ),
        Claim(
            key="gradient",
            text="in train mode the bias before BN gets no gradient",
            source="Ioffe and Szegedy 2015, section 3.2",
            number="gradient of the bias over that of the weight, float64",
            unit="fraction",
            low=0.0,
            high=1e-12,
            tolerance="the exact value is 0, and float64 rounds to 1e-16",
            refuted_if="BN did not subtract the mean, or its gradient did not flow through the mean",
        ),
        Claim(
            key="eval-gradient",
            text="with running statistics the bias gets a gradient like any other",
            source="bnlab",
            number="gradient of the bias over that of the weight in eval mode, float64",
            unit="fraction",
            low=1e-2,
            high=1e3,
            tolerance="the gradient of the weight has the same order of magnitude; a gradient of 0 would give 1e-16",
            refuted_if="eval mode subtracted the mean of the batch",
        ),
        Claim(
            key="fits-train",
            text="in train mode the network fits an offset of the target",
            source="bnlab",
            number="loss in train mode over offset squared, after training in train mode",
            unit="fraction",
            low=0.0,
            high=0.01,
            tolerance="without a shift the whole offset is left, which is 1; a fit leaves 1e-6",
            refuted_if="BN lost the shift in every case",
        ),
        Claim(
            key="fits-eval",
            text="in eval mode the network fits an offset of the target",
            source="bnlab",
            number="loss in eval mode over offset squared, after training in train mode",
            unit="fraction",
            low=0.0,
            high=0.01,
            tolerance="as in train mode; the stored variance is m/(m-1) times the used one, which adds 1e-7",
            refuted_if="eval mode could fit wx but not wx + b",
        ),
        Claim(
            key="absorbed",
            text="the running mean absorbs the bias: in eval mode the output is the same with and without the bias",
            source="bnlab",
            number="largest difference of the outputs in eval mode, in standard deviations, float64",
            unit="fraction",
            low=0.0,
            high=1e-6,
            tolerance="both networks start from the same weights, and rounding errors grow a little over the steps",
            refuted_if="eval mode saw a bias that train mode does not see",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Fit a linear target with an offset, with and without bias and affine parameters, in each mode."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(config.samples, config.features, generator=generator, dtype=torch.float64)
        direction = torch.randn(config.features, 1, generator=generator, dtype=torch.float64)
        rest = x @ direction
        target = (rest - rest.mean()) / rest.std(unbiased=False) + config.offset
        start = torch.rand(config.features + 1, generator=generator, dtype=torch.float64) - 0.5
        loss: dict[tuple[str, str], float] = {}
        outputs: dict[str, Tensor] = {}
        for index, (case, parts) in enumerate(_CASES.items()):
            by_mode = _outputs(parts, start, x, target, config)
            for mode, output in by_mode.items():
                loss[case, mode] = float(mse_loss(output, target)) / config.offset**2
            outputs[case] = by_mode[_EVAL]
            tick((index + 1) / len(_CASES))
        rows = list(loss)
        return Observation(
            values={
                "matters": {
                    f"{affine}, {mode}": loss[f"no bias, {affine}", mode] - loss[f"bias, {affine}", mode]
                    for mode in (_TRAIN, _EVAL, _FROZEN)
                    for affine in ("affine", "no affine")
                },
                "gradient": _gradients(x, target, start, training=True),
                "eval-gradient": _gradients(x, target, start, training=False),
                "fits-train": {case: loss[case, _TRAIN] for case in _CASES},
                "fits-eval": {case: loss[case, _EVAL] for case in _CASES},
                "absorbed": {
                    affine: float((outputs[f"bias, {affine}"] - outputs[f"no bias, {affine}"]).abs().max())
                    for affine in ("affine", "no affine")
                },
            },
            table={
                "case": [case for case, _ in rows],
                "mode": [mode for _, mode in rows],
                "loss": [loss[row] for row in rows],
            },
            notes=("Frozen statistics: one batch sets the buffers, and training then continues in eval mode.",),
        )

    def figure(self) -> Figure:
        """Draw the loss of each case, with one colour per mode."""
        return Figure(
            title="Loss on a target with an offset, over offset squared",
            mark=Mark.BAR,
            x=Axis("case", "the layer before BN, and BN's parameters"),
            y=Axis("loss", "loss / offset squared"),
            series="mode",
            rules=(Rule("y", 1.0, "the whole offset is lost"),),
        )


def _outputs(parts: tuple[bool, bool], start: Tensor, x: Tensor, target: Tensor, config: Config) -> dict[str, Tensor]:
    """Train one case on batch statistics and on frozen ones. Return the outputs in each mode."""
    net = _fit(_network(nn.BatchNorm1d, parts, start), x, target, config, frozen=False)
    frozen = _fit(_network(nn.BatchNorm1d, parts, start), x, target, config, frozen=True)
    with torch.no_grad():
        return {_TRAIN: net.train()(x), _EVAL: net.eval()(x), _FROZEN: frozen(x)}


def _network(layer_class: Callable[..., nn.Module], parts: tuple[bool, bool], start: Tensor) -> nn.Sequential:
    """Return linear -> BN. The weight depends on `start` alone, and the bias starts near 5."""
    biased, affine = parts
    linear = nn.Linear(len(start) - 1, 1, bias=biased, dtype=start.dtype)
    with torch.no_grad():
        linear.weight.copy_(start[:-1])
        if biased:
            linear.bias.fill_(5 + float(start[-1]))
    return nn.Sequential(linear, layer_class(1, affine=affine, dtype=start.dtype))


def _fit(net: nn.Sequential, x: Tensor, target: Tensor, config: Config, *, frozen: bool) -> nn.Sequential:
    """Train on one batch. Frozen statistics are those of the batch before the first step."""
    if frozen:
        setattr(net[1], "momentum", 1.0)  # noqa: B010
        net(x)
    net.train(not frozen)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        optimizer.zero_grad()
        mse_loss(net(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
    return net


def _gradients(x: Tensor, target: Tensor, start: Tensor, *, training: bool) -> dict[str, float]:
    """Return the gradient of the bias over that of the weight before training."""
    ratios = {}
    for name, layer_class in (("torch", nn.BatchNorm1d), ("bnlab", bnlab.nn.BatchNorm1d)):
        for affine in (True, False):
            net = _network(layer_class, (True, affine), start).train(training)
            mse_loss(net(x), target).backward()  # type: ignore[no-untyped-call]
            weight, bias = (torch.linalg.vector_norm(_gradient(net, key)) for key in ("0.weight", "0.bias"))
            ratios[f"{name}, {'affine' if affine else 'no affine'}"] = float(bias / weight)
    return ratios


def _gradient(net: nn.Module, name: str) -> Tensor:
    gradient = net.get_parameter(name).grad
    return torch.zeros(()) if gradient is None else gradient
