"""momentum: its effect on the running statistics, and whether momentum 0 is the method of Ioffe and Szegedy 2015."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

import bnlab.nn
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "Momentum", "two_updates"]

Layer = TypeVar("Layer", bound=nn.Module)

_TWO_UPDATES = {
    "eval before, 1e5": 99999.5,
    "eval before, 2e5": 199999.0,
    "train, 1e5": -1.0,
    "train, 2e5": 1.0,
    "running mean after 1": 15000.0,
    "running var after 1": 5.0e8,
    "running mean after 2": 28500.0,
    "running var after 2": 9.5e8,
    "eval after 2, 1e5": 2.3198,
    "eval after 2, 2e5": 5.5642,
}
"""The numbers for a layer without affine parameters, inputs 1e5 and 2e5, momentum 0.1 and two updates."""


@dataclass(frozen=True)
class Config:
    """Settings of momentum.

    Attributes:
        momenta: The weights of the new batch; None stands for a cumulative average.
        batch: The number of values per channel and update.
        updates: The number of updates in the test of the formula.
        replicas: The number of independent channels over which the noise is measured.
        drift: The drift of the mean of the input per update.
        horizon: The number of updates in the test of the decay, which leaves out momenta that forget more slowly.
    """

    momenta: tuple[float | None, ...] = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0, None)
    batch: int = 4
    updates: int = 50
    replicas: int = 2000
    drift: float = 1.0
    horizon: int = 5000


class Momentum(Experiment[Config]):
    """Momentum sets how fast the running statistics follow the batches, and momentum 0 stops them."""

    name = "momentum"
    source = "torch.nn.BatchNorm1d documentation; Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 2"
    quick = Config()
    full = Config(updates=1000, replicas=20000)
    claims = (
        Claim(
            key="formula",
            text="the running value is (1 - momentum) * old + momentum * new; with None every batch weighs the same",
            source="torch.nn.BatchNorm1d documentation",
            number="largest relative error of the buffers against the formula, with unbiased batch variances, float64",
            unit="fraction",
            low=0.0,
            high=1e-10,
            tolerance="float64 rounds to 1e-16 per update",
            refuted_if="a buffer were a different combination of the batches",
        ),
        Claim(
            key="two-updates",
            text="eval mode uses the running statistics and train mode the batch: ten numbers for inputs 1e5 and 2e5",
            source="torch.nn.BatchNorm1d documentation",
            number="measured number over calculated number",
            unit="ratio",
            low=1 - 2e-5,
            high=1 + 2e-5,
            tolerance="the calculated numbers have five digits",
            refuted_if="one of the ten numbers were different",
        ),
        Claim(
            key="zero",
            text="momentum 0 is the method of the paper",
            source="a common misreading of Ioffe and Szegedy 2015, Algorithm 2",
            number="running mean over the population mean, which Algorithm 2 of the paper uses",
            unit="ratio",
            low=0.9,
            high=1.1,
            tolerance="the mean over all batches has a standard error below 0.01",
            refuted_if="with momentum 0 the running mean stayed where it began, at 0",
        ),
        Claim(
            key="identity",
            text="with momentum 0 eval mode does not normalise: it is the identity",
            source="bnlab",
            number="eval output times sqrt(1 + eps) over input, after all updates",
            unit="ratio",
            low=1 - 1e-10,
            high=1 + 1e-10,
            tolerance="float64 rounds to 1e-16 per update",
            refuted_if="the buffers changed",
        ),
        Claim(
            key="paper",
            text="the method of the paper gives every batch the same weight: momentum None",
            source="Ioffe and Szegedy 2015, Algorithm 2, steps 8 to 10",
            number="largest relative error of the buffers against the mean of the batch means and m/(m-1) variances",
            unit="fraction",
            low=0.0,
            high=1e-10,
            tolerance="float64 rounds to 1e-16 per update",
            refuted_if="the buffers were a different average",
        ),
        Claim(
            key="forgets",
            text="1 % of a batch's weight is left after ln(0.01) / ln(1 - momentum) updates",
            source="the update formula in the torch.nn.BatchNorm1d documentation",
            number="updates until 1 % is left, over the formula rounded up",
            unit="ratio",
            low=1 - 1e-3,
            high=1 + 1e-3,
            tolerance="the limit is above one update of the several thousand at momentum 0.001; there is no randomness",
            refuted_if="the decay were not geometric",
        ),
        Claim(
            key="noise",
            text="the variance of the running mean is momentum / (2 - momentum) times that of a batch mean",
            source="the update formula in the torch.nn.BatchNorm1d documentation",
            number="variance over independent channels, over the value of the formula (None: 1 / updates)",
            unit="ratio",
            low=0.85,
            high=1.15,
            tolerance="2000 channels have a standard error of 0.032",
            refuted_if="the noise were averaged over more or fewer batches",
        ),
        Claim(
            key="lag",
            text="under a drift d per update the running mean lags by d * (1 - momentum) / momentum",
            source="the update formula in the torch.nn.BatchNorm1d documentation",
            number="mean lag over the value of the formula",
            unit="ratio",
            low=0.97,
            high=1.03,
            tolerance="noise causes 0.005 at momentum 0.5 and less below; the initial values cause 0.001",
            refuted_if="the average age of a batch were different",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Feed noise, drift and a step to layers with each momentum. Measure the ten numbers of two updates."""
        generator = torch.Generator().manual_seed(seed)
        batches = 3 + 2 * torch.randn(
            config.updates, max(config.batch, 200), 4, generator=generator, dtype=torch.float64
        )
        formula = _formula(config, batches)
        tick(0.2)
        frozen = _run_on_batches(nn.BatchNorm1d(4, momentum=0.0, affine=False, dtype=torch.float64), batches)
        cumulative = _run_on_batches(nn.BatchNorm1d(4, momentum=None, dtype=torch.float64), batches)
        means, variances = batches.mean(1).mean(0), batches.var(1, unbiased=True).mean(0)
        x = batches[-1]
        identity = frozen.eval()(x) * math.sqrt(1 + frozen.eps) / x
        table: dict[str, list[float | str]] = {"momentum": [], "updates": [], "share": []}
        forgets, noise, lag = {}, {}, {}
        for index, momentum in enumerate(config.momenta):
            forgotten = _step(momentum, config.horizon, table)
            expected = math.ceil(math.log(0.01) / math.log(1 - momentum)) if momentum and momentum < 1 else math.inf
            if expected <= config.horizon:
                forgets[f"{momentum}"] = forgotten / expected
            if momentum != 0:
                noise[f"{momentum}"], late = _noise_and_lag(config, momentum, generator)
                if momentum is not None and momentum < 1:
                    lag[f"{momentum}"] = late / (config.drift * (1 - momentum) / momentum)
            tick(0.2 + 0.8 * (index + 1) / len(config.momenta))
        return Observation(
            values={
                "formula": formula,
                "two-updates": {
                    f"{name}: {key}": value / _TWO_UPDATES[key]
                    for name, layer_class in _layer_classes().items()
                    for key, value in two_updates(layer_class).items()
                },
                "zero": {"": float((_buffers(frozen)[0] / means).mean())},
                "identity": {"": float(identity.flatten()[(identity - 1).abs().argmax()])},
                "paper": {"": _error(cumulative, means, variances)},
                "forgets": forgets,
                "noise": noise,
                "lag": lag,
            },
            table=table,
            notes=("The ten numbers and the decay are deterministic. The seeds differ in the noise.",),
        )

    def figure(self) -> Figure:
        """Draw how the running mean follows a step, with a line per momentum."""
        return Figure(
            title="Running mean after the mean of the input stepped from 0 to 1",
            mark=Mark.LINE,
            x=Axis("updates", "updates", log=True),
            y=Axis("share", "running mean"),
            series="momentum",
            rules=(Rule("y", 0.99, "1 % left"),),
        )


def _layer_classes() -> dict[str, type[nn.Module]]:
    return {"torch": nn.BatchNorm1d, "bnlab": bnlab.nn.BatchNorm1d}


def _formula(config: Config, batches: Tensor) -> dict[str, float]:
    """Return the error of the buffers against the update formula, by layer and momentum."""
    errors = {}
    for name, layer_class in _layer_classes().items():
        for momentum in config.momenta:
            layer = _run_on_batches(layer_class(4, momentum=momentum, dtype=torch.float64), batches)
            errors[f"{name}, {momentum}"] = _error(layer, *_recursion(batches, momentum))
    return errors


def two_updates(layer_class: type[nn.Module] = nn.BatchNorm1d) -> dict[str, float]:
    """Return ten numbers of a layer without affine parameters for the inputs 1e5 and 2e5, over two updates."""
    layer = layer_class(1, momentum=0.1, affine=False)
    x = torch.tensor([[1e5], [2e5]])
    numbers = [*layer.eval()(x).flatten().tolist(), *layer.train()(x).flatten().tolist()]
    numbers += [float(buffer) for buffer in _buffers(layer)]
    layer(x)
    numbers += [float(buffer) for buffer in _buffers(layer)]
    numbers += layer.eval()(x).flatten().tolist()
    return dict(zip(_TWO_UPDATES, numbers, strict=True))


def _buffers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return mean.detach().clone(), var.detach().clone()


@torch.no_grad()
def _run_on_batches(layer: Layer, batches: Tensor) -> Layer:
    for batch in batches:
        layer.train()(batch)
    return layer


def _recursion(batches: Tensor, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Return both running statistics by the update formula."""
    mean, var = torch.zeros_like(batches[0, 0]), torch.ones_like(batches[0, 0])
    for index, batch in enumerate(batches):
        new = 1 / (index + 1) if momentum is None else momentum
        centre = batch.sum(0) / len(batch)
        mean = (1 - new) * mean + new * centre
        var = (1 - new) * var + new * (batch - centre).square().sum(0) / (len(batch) - 1)
    return mean, var


def _error(layer: nn.Module, mean: Tensor, var: Tensor) -> float:
    """Return the largest error of both buffers: of the mean in standard deviations, of the variance relative."""
    have_mean, have_var = _buffers(layer)
    return max(float(((have_mean - mean) / var.sqrt()).abs().max()), float((have_var / var - 1).abs().max()))


@torch.no_grad()
def _step(momentum: float | None, horizon: int, table: dict[str, list[float | str]]) -> int:
    """Show batches of mean 1 to a new layer. Return the updates until 1 % of its start is left, or 0."""
    layer = nn.BatchNorm1d(1, momentum=momentum, dtype=torch.float64)
    x = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    drawn = {round(10 ** (step / 8)) for step in range(1 + math.floor(8 * math.log10(horizon)))}
    forgotten = 0
    for update in range(1, horizon + 1):
        layer(x)
        share = float(layer.get_buffer("running_mean"))
        if update in drawn:
            table["momentum"].append(f"{momentum}")
            table["updates"].append(float(update))
            table["share"].append(share)
        if not forgotten and share >= 0.99 * (1 - 1e-12):
            forgotten = update
    return forgotten


@torch.no_grad()
def _noise_and_lag(config: Config, momentum: float | None, generator: torch.Generator) -> tuple[float, float]:
    """Feed noise around a drifting mean. Return the variance over the formula, and the mean lag."""
    updates = 100 if momentum is None else max(5, math.ceil(7 / momentum))
    layer = nn.BatchNorm1d(config.replicas, momentum=momentum, affine=False)
    centre = 0.0
    for update in range(updates):
        centre = config.drift * update
        layer(centre + torch.randn(config.batch, config.replicas, generator=generator))
    mean = layer.get_buffer("running_mean").double()
    expected = 1 / updates if momentum is None else momentum / (2 - momentum)
    return float(mean.var() * config.batch / expected), centre - float(mean.mean())
