"""activation-distributions: Figure 1 of Ioffe and Szegedy 2015, and whether steady distributions explain BN's gain."""

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
_MIN_GAIN = 0.02


@dataclass(frozen=True)
class Config:
    """Settings of activation-distributions. The paper states neither the learning rate nor the initial weights.

    Attributes:
        data: "mnist" or "digits", made binary as in the paper; "auto" stands for the first that is present.
        images: The largest number of training images.
        probe: The largest number of test images, which give the accuracy and the percentiles.
        steps: The steps of plain stochastic gradient descent.
        batch: Images per step.
        rates: The learning rates; each is a condition.
        init: The standard deviation of the initial weights; biases begin at 0.
        logged: How often the distribution is measured, evenly over the steps.
        early: The step that counts as early in training.
        noise_mean: The largest mean of the noise after BN for one unit, drawn again at each step.
        noise_scale: The largest factor of the noise for one unit, drawn again at each step; the smallest is 1.
        noise_spread: How far the mean and the factor of one example are from those of the unit.
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
    """BN keeps the input of a sigmoid steady during training, which need not be the reason why BN helps."""

    name = "activation-distributions"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), section 4.1; Santurkar et al. 2018 (arXiv 1805.11604)"
    quick = Config()
    full = Config(
        images=60_000, probe=10_000, steps=50_000, rates=(0.01, 0.03, 0.1, 0.5, 1.0, 2.0), logged=100, early=1000
    )
    claims = (
        Claim(
            key="steady",
            text="BN keeps the distribution of the inputs of an activation steady while earlier layers change",
            source="Ioffe and Szegedy 2015, Figure 1b and 1c",
            number="largest minus smallest median input of a typical last-layer sigmoid, with BN over without BN",
            unit="ratio",
            low=0.0,
            high=0.9,
            tolerance="the limit is a tenth below equal; the width of the distribution may grow, as in the paper",
            refuted_if="the median moved as far with BN as without",
        ),
        Claim(
            key="early",
            text="early in training the network with BN has a far higher accuracy",
            source="Ioffe and Szegedy 2015, Figure 1a: accuracy 0.95 against 0.71 at the first point",
            number="test accuracy with BN minus test accuracy without BN, at the early step",
            unit="points",
            low=10.0,
            high=math.inf,
            tolerance="the paper shows 24 points, and states neither the step nor the learning rate",
            refuted_if="the two accuracies were within ten points of each other",
        ),
        Claim(
            key="end",
            text="at the end the network without BN has nearly caught up",
            source="Ioffe and Szegedy 2015, Figure 1a: less than a point apart after 50,000 steps",
            number="test accuracy with BN minus test accuracy without BN, after the last step",
            unit="points",
            low=-2.0,
            high=2.0,
            tolerance="one point is the gap of the paper, and one point is the sampling error of 1000 test images",
            refuted_if="the gap stayed wider at every learning rate",
        ),
        Claim(
            key="saturation",
            text="BN keeps sigmoids out of saturation",
            source="Ioffe and Szegedy 2015, section 2",
            number="share of hidden inputs above 4 in absolute value after the last step, without BN minus with BN",
            unit="share",
            low=1e-3,
            high=1.0,
            tolerance="below a thousandth of the inputs, neither network is saturated",
            refuted_if="as many inputs were saturated with BN as without, or more",
        ),
        Claim(
            key="shift-back",
            text="noise after BN brings the shift back, without which the next claim would test nothing",
            source="Santurkar et al. 2018, section 2.2",
            number="path of the median, with BN and noise over with BN alone",
            unit="ratio",
            low=1.5,
            high=math.inf,
            tolerance="a ratio of 1.5 is larger than the difference between seeds",
            refuted_if="the median moved no further with the noise",
        ),
        Claim(
            key="mechanism",
            text="BN helps because it reduces the shift: its gain is lost when noise brings the shift back",
            source="Ioffe and Szegedy 2015, section 1; disputed by Santurkar et al. 2018",
            number="share of BN's early gain in accuracy that the noise removes; 0 where BN gains less than 2 points",
            unit="share",
            low=0.5,
            high=math.inf,
            tolerance="if the shift is the main reason, at least half of the gain is lost",
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
                f"the paper states neither learning rate nor initial weights; these have a std of {config.init:g}",
                "the inputs are normalised by batch statistics as in training; the batch is the test images",
                "the accuracy is measured with the running statistics, without noise",
                "the typical sigmoid has the median path; its sign is chosen to make the largest excursion positive",
                "the kind of noise is that of Santurkar et al. 2018, section 2.2; its constants were not checked",
            ),
        )

    def figure(self) -> Figure:
        """Draw three percentiles over the steps, with a panel for each network and learning rate."""
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
    """The measurements of one training run.

    Attributes:
        steps: The steps of the measurements.
        accuracy: The accuracy on the test images at each of them.
        percentiles: The percentiles of the inputs of each unit of the last hidden layer. Shape (measurements,
            percentiles, units).
        saturated: The share of all hidden inputs in saturation, at the end.
    """

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    percentiles: Tensor
    saturated: float

    @property
    def paths(self) -> Tensor:
        """The path of the median of each unit: its largest minus its smallest value."""
        median = self.percentiles[:, _PERCENTILES.index(50)]
        return median.amax(0) - median.amin(0)

    def early(self, step: int) -> float:
        """Return the accuracy of the first measurement from a step on."""
        later = [value for at, value in zip(self.steps, self.accuracy, strict=True) if at >= step]
        return later[0] if later else self.accuracy[-1]

    def typical(self) -> Tensor:
        """Return the percentiles of the unit with the median path, signed so that its largest excursion is positive."""
        course = self.percentiles[:, :, int(self.paths.median(0).indices)]
        median = course[:, _PERCENTILES.index(50)]
        return course if median.amax() >= -median.amin() else -course.flip(1)


class _Noise(nn.Module):
    """Noise with its own mean and scale for each unit and step, which Santurkar et al. 2018 put after BN."""

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
    """Return a network. The initial weights are the same for every kind."""
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
    """Yield the inputs of the sigmoids, layer by layer, normalised as in training, without a statistics update."""
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
        "mechanism": lost / gain if gain >= _MIN_GAIN else 0.0,
    }


def _ratio(path: float, other: float) -> float:
    """Return the path of one median over the path of another; 1 if neither median moved."""
    return path / other if other else (math.inf if path else 1.0)


def _append(table: dict[str, list[float | str]], network: str, course: _Course) -> None:
    """Add the rows of one training run."""
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
