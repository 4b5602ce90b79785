"""learning-rate: how much BN raises the largest usable learning rate, and whether deep sigmoid networks need BN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn import BatchNorm1d
from torch.nn.functional import cross_entropy

from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, minibatches, seeded
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "LearningRate"]

_NETWORKS = ("no BN", "BN")
_TIMES = (1, 5, 30)
_LEARNED = 0.9  # a network learns if its last loss is below this share of its first loss
_LAST = 20  # number of steps whose mean is the last loss


@dataclass(frozen=True)
class Config:
    """Settings of learning-rate.

    Attributes:
        data: "digits" or "mnist"; "auto" stands for digits, which are small.
        images: The largest number of training images.
        probe: The largest number of test images.
        depth: The hidden layers of the ReLU network.
        width: The units of each hidden layer.
        batch: The images per step.
        steps: The steps of plain stochastic gradient descent at every learning rate.
        rates: The learning rates of the ReLU network, in a geometric series.
        depths: The hidden layers of the sigmoid networks; each is a condition.
        sigmoid_steps: The steps of a sigmoid network.
        sigmoid_rates: The learning rates of a sigmoid network, of which the best counts.
    """

    data: str = "auto"
    images: int = 20_000
    probe: int = 1000
    depth: int = 3
    width: int = 64
    batch: int = 64
    steps: int = 200
    rates: tuple[float, ...] = tuple(2.0**power for power in range(-6, 7))
    depths: tuple[int, ...] = (2, 3, 8)
    sigmoid_steps: int = 300
    sigmoid_rates: tuple[float, ...] = (0.1, 1.0, 8.0)


class LearningRate(Experiment[Config]):
    """BN tolerates higher learning rates, and a deep sigmoid network learns with BN."""

    name = "learning-rate"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), sections 3.3 and 4.2; Bjorck et al. 2018 (arXiv 1806.02375)"
    quick = Config()
    full = Config(
        data="mnist",
        images=60_000,
        probe=10_000,
        width=100,
        steps=2000,
        rates=tuple(2.0 ** (power / 2) for power in range(-16, 17)),
        depths=(1, 2, 3, 4, 6, 8, 10),
        sigmoid_steps=5000,
        sigmoid_rates=(0.03, 0.1, 0.3, 1.0, 3.0, 8.0),
    )
    claims = (
        Claim(
            key="higher",
            text="BN tolerates a higher learning rate",
            source="Ioffe and Szegedy 2015, section 3.3",
            number="largest learning rate at which the loss falls, with BN over without BN",
            unit="ratio",
            low=2.0,
            high=math.inf,
            tolerance="it falls if the mean of the last 20 losses is below 0.9 of the first; the grid has steps of 2",
            refuted_if="both networks stopped learning at the same rate",
        ),
        Claim(
            key="bn-times",
            text="with BN the network learns at 5 and 30 times the learning rate",
            source="Ioffe and Szegedy 2015, section 4.2.2: BN-x5 and BN-x30",
            number="test accuracy with BN at a multiple of the rate that is best without BN",
            unit="share",
            low=0.8,
            high=1.0,
            tolerance="chance is 0.1, and a network that learns these images is above 0.9",
            refuted_if="the network learned at no multiple of the rate",
        ),
        Claim(
            key="plain-times",
            text="without BN the network does not learn at 5 times the learning rate",
            source="Ioffe and Szegedy 2015, section 4.2.2: the parameters reached machine infinity",
            number="test accuracy without BN at a multiple of its best rate; outputs that overflow count as misses",
            unit="share",
            low=0.0,
            high=0.3,
            tolerance="chance is 0.1, and the limit leaves room for a network that learned one class more",
            refuted_if="the network without BN learned at the higher rates as well",
        ),
        Claim(
            key="sigmoid-chance",
            text="without BN a sigmoid network stays at chance",
            source="Ioffe and Szegedy 2015, section 4.2.2: a sigmoid Inception never did better than chance",
            number="test accuracy without BN at the best of the learning rates",
            unit="share",
            low=0.0,
            high=0.2,
            tolerance="chance is 0.1, and the best of several measurements is higher",
            refuted_if="the network learned at every depth",
        ),
        Claim(
            key="sigmoid-learns",
            text="with BN the same sigmoid network learns",
            source="Ioffe and Szegedy 2015, section 4.2.2: BN-x5-Sigmoid reached 69.8 %",
            number="test accuracy with BN at the best of the learning rates",
            unit="share",
            low=0.8,
            high=1.0,
            tolerance="the limit is well above chance, 0.1, and below the accuracy of a shallow network, 0.95",
            refuted_if="the network stayed near chance at every depth",
        ),
    )

    def resolve(self, config: Config) -> Config:
        """Fill in the data set."""
        return dataclasses.replace(config, data=datasets.chosen(config.data, "digits", "mnist", folder=self.data_dir))

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train with and without BN at each learning rate, then sigmoid networks of each depth."""
        data = self.resolve(config).data
        train, test = (
            _flat(datasets.load(f"{data}:{split}", batch_size=count, folder=self.data_dir)[0])
            for split, count in (("train", config.images), ("test", config.probe))
        )
        bench = _Bench(config, seed, train, test)
        rectified = f"ReLU, {config.depth} layers"
        plain, normalised = (bench.sweep(rectified, network, config.rates) for network in _NETWORKS)
        tick(0.3)
        best = min(plain, key=lambda rate: plain[rate].loss)
        times = {
            network: {f"x{factor}": bench.train(rectified, network, factor * best).accuracy for factor in _TIMES}
            for network in _NETWORKS
        }
        tick(0.4)
        reached: dict[str, dict[str, float]] = {network: {} for network in _NETWORKS}
        for index, depth in enumerate(config.depths):
            for network in _NETWORKS:
                trainings = bench.sweep(f"sigmoid, {depth} layers", network, config.sigmoid_rates)
                reached[network][f"{depth} layers"] = max(training.accuracy for training in trainings.values())
            tick(0.4 + 0.6 * (index + 1) / len(config.depths))
        return Observation(
            values={
                "higher": {"": _largest_rate(normalised) / _largest_rate(plain) if _largest_rate(plain) else math.inf},
                "bn-times": times["BN"],
                "plain-times": {factor: reach for factor, reach in times["no BN"].items() if factor != "x1"},
                "sigmoid-chance": reached["no BN"],
                "sigmoid-learns": reached["BN"],
            },
            table=bench.table,
            notes=(
                f"data: {data}, {len(train[1])} training and {len(test[1])} test images; PyTorch's own initial weights",
                "multiples refer to the learning rate with the lowest loss without BN, for each seed",
            ),
        )

    def figure(self) -> Figure:
        """Draw the accuracy over the learning rate, with lines for BN and no BN and a panel per kind of network."""
        return Figure(
            title="Test accuracy after the same number of steps, by learning rate",
            mark=Mark.LINE,
            x=Axis("rate", "learning rate", log=True),
            y=Axis("accuracy", "test accuracy"),
            series="network",
            panel="kind",
            low="low",
            high="high",
            rules=(Rule("y", 0.1, "chance"),),
        )


@dataclass(frozen=True)
class _Training:
    """The outcome of one training run.

    Attributes:
        first: The loss of the first batch.
        loss: The mean of the last losses; inf if one of them was not finite.
        accuracy: The accuracy on the test images.
    """

    first: float
    loss: float
    accuracy: float


class _Bench:
    """Trains networks of all kinds on the same data.

    Attributes:
        table: The rows of the figure, one for each training run of a sweep.
    """

    def __init__(self, config: Config, seed: int, train: Batch, test: Batch) -> None:
        self._config, self._seed, self._train, self._test = config, seed, train, test
        self.table: dict[str, list[float | str]] = {"kind": [], "network": [], "rate": [], "accuracy": []}

    def sweep(self, kind: str, network: str, rates: Sequence[float]) -> dict[float, _Training]:
        """Train at each learning rate, and add each run to the table."""
        trainings = {rate: self.train(kind, network, rate) for rate in rates}
        for rate, training in trainings.items():
            row: list[float | str] = [kind, network, rate, training.accuracy]
            for column, value in zip(self.table.values(), row, strict=True):
                column.append(value)
        return trainings

    def train(self, kind: str, network: str, rate: float) -> _Training:
        """Train one network. The initial weights and the batches are the same at every rate."""
        sigmoid, config = kind.startswith("sigmoid"), self._config
        depth = int(kind.split()[1])
        model = _build(
            self._train[0].shape[1], depth, config.width, nn.Sigmoid if sigmoid else nn.ReLU, network, self._seed
        )
        losses = self._losses(model, rate, config.sigmoid_steps if sigmoid else config.steps)
        last = losses[-_LAST:]
        loss = math.fsum(last) / len(last) if all(map(math.isfinite, last)) else math.inf
        return _Training(losses[0], loss, accuracy(model, self._test))

    def _losses(self, model: nn.Module, rate: float, steps: int) -> list[float]:
        """Return the loss of each step, up to the first that is not finite."""
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        batches = minibatches(self._train, self._config.batch, torch.Generator().manual_seed(self._seed))
        losses = []
        for images, labels in islice(batches, steps):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return losses


def _build(
    inputs: int, depth: int, width: int, activation: Callable[[], nn.Module], network: str, seed: int
) -> nn.Sequential:
    """Return a network. The initial weights are the same with and without BN."""
    with seeded(seed):
        layers: list[nn.Module] = []
        for size in (inputs, *[width] * (depth - 1)):
            layers.append(nn.Linear(size, width))
            if network == "BN":
                layers.append(BatchNorm1d(width))
            layers.append(activation())
        return nn.Sequential(*layers, nn.Linear(width, 10))


def _largest_rate(trainings: dict[float, _Training]) -> float:
    """Return the largest learning rate at which the loss falls; 0 if there is none."""
    return max((rate for rate, training in trainings.items() if training.loss < _LEARNED * training.first), default=0.0)


def _flat(data: Batch) -> Batch:
    return data[0].flatten(1), data[1]
