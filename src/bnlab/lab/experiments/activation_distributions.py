"""activation-distributions: Figure 1 of the paper, and whether a steady distribution is why BN helps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm1d

from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, minibatches, take_step
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.records import Axis, Figure, Mark

__all__ = ["ActivationDistributions", "Config"]

_NETWORKS = ("no BN", "BN", "BN and noise")
_PERCENTILES = (15, 50, 85)
_WIDTH = 100
_HIDDEN = 3
_SATURATED = 4.0  # the derivative of the sigmoid is 0.018 there, a fourteenth of its largest
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Config:
    """Settings of activation-distributions. The paper states neither the learning rate nor the initial weights.

    Attributes:
        data: "mnist" or "digits", made binary as in the paper; "auto" for the first that is present.
        images: Training images, at most.
        probe: Test images, at most: for the accuracy and for the percentiles.
        steps: Of plain stochastic gradient descent.
        batch: Images per step.
        rates: Learning rates; each is a condition.
        init: Standard deviation of the initial weights; biases begin at 0.
        logged: How often the distribution is looked at, evenly over the steps.
        early: The step that counts as early in training.
        noise_mean: The noise after BN: largest mean of a unit, drawn anew at each step.
        noise_scale: Largest factor of a unit, drawn anew at each step; the smallest is 1.
        noise_spread: How far mean and factor of one example are from those of the unit.
    """

    data: str = "auto"
    images: int = 20_000
    probe: int = 1000
    steps: int = 1200
    batch: int = 60
    rates: tuple[float, ...] = (0.1, 0.5, 2.0)
    init: float = 0.1
    logged: int = 30
    early: int = 200
    noise_mean: float = 0.5
    noise_scale: float = 1.25
    noise_spread: float = 0.1


class ActivationDistributions(Experiment[Config]):
    """BN keeps the input of a sigmoid steady during training; whether that is why it trains faster."""

    name = "activation-distributions"
    source = "article, A4 and A5; Ioffe and Szegedy 2015, section 4.1 and Figure 1; Santurkar et al. 2018"
    quick = Config()
    full = Config(
        images=60_000, probe=10_000, steps=50_000, rates=(0.01, 0.03, 0.1, 0.5, 1.0, 2.0), logged=100, early=1000
    )
    claims = (
        Claim(
            key="steady",
            text="BN keeps the distribution of the inputs of an activation steady while earlier layers change",
            source="article, A4; Ioffe and Szegedy 2015, Figure 1b and 1c",
            number="largest minus smallest median of the input of a typical sigmoid, last hidden layer: BN over no BN",
            unit="ratio",
            low=0.0,
            high=0.9,
            tolerance="a tenth below equal; the width of the distribution may grow, as gamma does in the paper",
            refuted_if="the median moved as far with BN as without",
        ),
        Claim(
            key="early",
            text="early in training the network with BN is far ahead",
            source="Ioffe and Szegedy 2015, Figure 1a: 0.95 against 0.71 at its first point",
            number="test accuracy with BN minus that without, at the early step",
            unit="points",
            low=10.0,
            high=math.inf,
            tolerance="the paper shows 24 points; at which step and learning rate it does not say",
            refuted_if="the accuracies were within ten points of each other",
        ),
        Claim(
            key="end",
            text="at the end the network without BN has nearly caught up",
            source="Ioffe and Szegedy 2015, Figure 1a: less than a point apart after 50,000 steps",
            number="test accuracy with BN minus that without, after the last step",
            unit="points",
            low=-2.0,
            high=2.0,
            tolerance="a point as in the paper, and a point for the sampling error of a thousand test images",
            refuted_if="the gap stayed wider at every learning rate",
        ),
        Claim(
            key="saturation",
            text="BN keeps sigmoids out of saturation",
            source="article, A5; Ioffe and Szegedy 2015, section 2",
            number="share of hidden inputs beyond 4 in absolute value, after the last step: no BN minus BN",
            unit="share",
            low=1e-3,
            high=1.0,
            tolerance="a thousandth of the inputs; below that neither network is saturated",
            refuted_if="as many were saturated with BN, or more",
        ),
        Claim(
            key="shift-back",
            text="noise after BN brings the shift back (or the next claim would test nothing)",
            source="Santurkar et al. 2018, section 2.2",
            number="path of the median: BN and noise over BN",
            unit="ratio",
            low=1.5,
            high=math.inf,
            tolerance="half as much again is more than seeds differ by",
            refuted_if="the median moved no further with the noise",
        ),
        Claim(
            key="mechanism",
            text="BN helps because it reduces the shift: with the shift back, its gain is lost",
            source="Ioffe and Szegedy 2015, section 1; disputed by Santurkar et al. 2018",
            number="share of BN's early gain in accuracy that the noise takes away; 0 where BN gains under 2 points",
            unit="share",
            low=0.5,
            high=math.inf,
            tolerance="at least half of the gain, if the shift is the main reason",
            refuted_if="the network with noise kept most of the gain",
        ),
    )

    def resolve(self, config: Config) -> Config:
        """Fill in the data set."""
        return dataclasses.replace(config, data=datasets.chosen(config.data, "mnist", "digits", folder=self.data_dir))

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train the three networks from the same weights on the same batches, at each learning rate."""
        data = self.resolve(config).data
        train, test = (
            _binary(datasets.load(f"{data}:{split}", batch_size=count, folder=self.data_dir)[0])
            for split, count in (("train", config.images), ("test", config.probe))
        )
        values: dict[str, dict[str, float]] = {claim.key: {} for claim in self.claims}
        table: dict[str, list[float | str]] = {
            name: [] for name in ("network", "percentile", "step", "input", "accuracy")
        }
        whole = len(config.rates) * len(_NETWORKS)
        for index, rate in enumerate(config.rates):
            courses = []
            for place, network in enumerate(_NETWORKS):
                course = _train(config, network, rate, seed, train, test)
                courses.append(course)
                _append(table, f"{network}, rate {rate:g}", course)
                tick((index * len(_NETWORKS) + place + 1) / whole)
            for key, value in _numbers(config, *courses).items():
                values[key][f"rate {rate:g}"] = value
        return Observation(
            values=values,
            table=table,
            notes=(
                f"data: {data}, {len(train[1])} training and {len(test[1])} test images, binary",
                f"learning rate and initial weights (normal, {config.init:g}) are ours: the paper states neither",
                "the inputs are those that training sees: normalised by statistics of the batch, here the test images",
                "the accuracy is by the running statistics, without noise",
                "the typical sigmoid is that with the median path, drawn so that its largest excursion is positive",
                "the kind of noise is Santurkar's, its constants are quoted from memory",
            ),
        )

    def figure(self) -> Figure:
        """Draw three percentiles over the steps, a panel for each network and learning rate."""
        return Figure(
            title="Input of a typical sigmoid of the last hidden layer during training: 15th, 50th and 85th percentile",
            mark=Mark.LINE,
            x=Axis("step", "steps"),
            y=Axis("input", "input of the sigmoid"),
            series="percentile",
            panel="network",
            low="low",
            high="high",
        )


@dataclass(frozen=True)
class _Course:
    """What was seen of one training.

    Attributes:
        steps: When it was looked at.
        accuracy: On the test images, then.
        percentiles: Of the inputs of each unit of the last hidden layer, of shape (looks, percentiles, units).
        saturated: Share of all hidden inputs in saturation, at the end.
    """

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    percentiles: Tensor
    saturated: float

    @property
    def paths(self) -> Tensor:
        """How far the median of each unit moved: largest minus smallest."""
        median = self.percentiles[:, _PERCENTILES.index(50)]
        return median.amax(0) - median.amin(0)

    def early(self, step: int) -> float:
        """Return the accuracy at the first look from a step on."""
        later = [value for at, value in zip(self.steps, self.accuracy, strict=True) if at >= step]
        return later[0] if later else self.accuracy[-1]

    def typical(self) -> Tensor:
        """Return the percentiles of the unit with the median path, signed so that its largest excursion is positive."""
        course = self.percentiles[:, :, int(self.paths.median(0).indices)]
        median = course[:, _PERCENTILES.index(50)]
        return course if median.amax() >= -median.amin() else -course.flip(1)


class _Noise(nn.Module):
    """Noise with a mean and a scale of its own for each unit and step, as Santurkar et al. put it after BN."""

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__()
        self.config, self.generator = config, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        config, units = self.config, x.shape[1:]
        mean = config.noise_mean * self._uniform(units) + config.noise_spread * self._uniform(x.shape)
        scale = 1 + (config.noise_scale - 1) * (1 + self._uniform(units)) / 2
        return x * (scale + config.noise_spread * torch.randn(x.shape, generator=self.generator)) + mean

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return 2 * torch.rand(shape, generator=self.generator) - 1


def _build(config: Config, network: str, inputs: int, seed: int) -> nn.Sequential:
    """Return a network; the initial weights are the same for every kind."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for width in (inputs, *[_WIDTH] * (_HIDDEN - 1)):
        layers.append(_linear(config, width, _WIDTH, generator))
        if network != "no BN":
            layers.append(BatchNorm1d(_WIDTH))
        if network == "BN and noise":
            layers.append(_Noise(config, seed))
        layers.append(nn.Sigmoid())
    return nn.Sequential(*layers, _linear(config, _WIDTH, 10, generator))


def _linear(config: Config, inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, config.init, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _train(config: Config, network: str, rate: float, seed: int, train: Batch, test: Batch) -> _Course:
    model = _build(config, network, train[0].shape[1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    looks = {round(config.steps * (look + 1) / config.logged) for look in range(config.logged)} - {0}
    accuracies, percentiles, last = [], [], torch.empty(0)
    batches = minibatches(train, config.batch, torch.Generator().manual_seed(seed))
    for step, batch in enumerate(islice(batches, config.steps), start=1):
        take_step(model, [batch], optimizer)
        if step in looks:
            accuracies.append(accuracy(model, test))
            inputs = list(_hidden_inputs(model, test[0]))
            last = torch.cat(inputs)
            percentiles.append(inputs[-1].quantile(torch.tensor(_PERCENTILES) / 100, dim=0))
    saturated = float((last.abs() > _SATURATED).double().mean())
    return _Course(tuple(sorted(looks)), tuple(accuracies), torch.stack(percentiles), saturated)


def _hidden_inputs(model: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of the sigmoids, layer by layer, normalised as in training; no running statistics move."""
    with torch.no_grad(), impose_batch_statistics(model):
        for layer in model:
            if isinstance(layer, nn.Sigmoid):
                yield x
            x = layer(x)


def _numbers(config: Config, plain: _Course, normalised: _Course, noisy: _Course) -> dict[str, float]:
    """Return the number of each claim."""
    path = {name: float(course.paths.median()) for name, course in (("plain", plain), ("bn", normalised))}
    gain = normalised.early(config.early) - plain.early(config.early)
    lost = normalised.early(config.early) - noisy.early(config.early)
    return {
        "steady": _ratio(path["bn"], path["plain"]),
        "early": 100 * gain,
        "end": 100 * (normalised.accuracy[-1] - plain.accuracy[-1]),
        "saturation": plain.saturated - normalised.saturated,
        "shift-back": _ratio(float(noisy.paths.median()), path["bn"]),
        "mechanism": lost / gain if gain >= _LEAST_GAIN else 0.0,
    }


def _ratio(path: float, other: float) -> float:
    """Return how far one median moved over how far another did; 1 if neither did."""
    return path / other if other else (math.inf if path else 1.0)


def _append(table: dict[str, list[float | str]], network: str, course: _Course) -> None:
    """Add the rows of one training."""
    typical = course.typical()
    for column, percentile in enumerate(_PERCENTILES):
        for look, step in enumerate(course.steps):
            row: list[float | str] = [network, f"{percentile}th", float(step), float(typical[look, column])]
            row.append(course.accuracy[look])
            for name, value in zip(table, row, strict=True):
                table[name].append(value)


def _binary(data: Batch) -> Batch:
    """Return the images as vectors of zeros and ones, as the paper feeds them."""
    images, labels = data
    return (images > 0.5).to(torch.float32).flatten(1), labels
