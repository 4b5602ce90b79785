"""steps-to-accuracy: the "14 times fewer training steps" of Ioffe and Szegedy 2015, on a small network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn import BatchNorm2d

from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, minibatches, seeded, take_step
from bnlab.records import Axis, Figure, Mark

__all__ = ["Config", "StepsToAccuracy"]

_SETTINGS = (("no BN", 1), ("no BN", 5), ("BN", 1), ("BN", 5), ("BN", 30))
_BASELINE = _SETTINGS[0]


@dataclass(frozen=True)
class Config:
    """Settings of steps-to-accuracy.

    Attributes:
        data: "cifar10" or "digits"; "auto" stands for the first that is present.
        images: The largest number of images of the training split, of which the last are held out.
        held_out: The number of images that are held out, at most a fifth.
        channels: The channels of each convolution. Each convolution halves the image.
        batch: The images per step.
        steps: The steps of plain stochastic gradient descent.
        every: The steps between two measurements of the accuracy.
        rates: The learning rates of the baseline without BN. Each is a condition, and the other settings use multiples.
    """

    data: str = "auto"
    images: int = 4000
    held_out: int = 500
    channels: tuple[int, ...] = (16, 32, 32)
    batch: int = 32
    steps: int = 300
    every: int = 10
    rates: tuple[float, ...] = (0.02, 0.1)


class StepsToAccuracy(Experiment[Config]):
    """BN saves steps on the way to the accuracy of a network without BN."""

    name = "steps-to-accuracy"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), section 4.2.2 and Figure 3"
    quick = Config()
    full = Config(
        images=50_000, held_out=5000, channels=(32, 64, 64), steps=20_000, every=50, rates=(0.005, 0.02, 0.05, 0.1)
    )
    claims = (
        Claim(
            key="fewer",
            text="BN alone reaches the same accuracy in fewer steps",
            source="Ioffe and Szegedy 2015, Figure 3: 31.0e6 steps against 13.3e6, a ratio of 2.3",
            number="steps to the best accuracy without BN, no BN over BN; 0 if BN never reaches it",
            unit="ratio",
            low=1.1,
            high=math.inf,
            tolerance="a tenth is about the distance between two measurements of the accuracy",
            refuted_if="BN needed as many steps or more",
        ),
        Claim(
            key="higher-rate",
            text="BN needs still fewer steps with a higher learning rate",
            source="Ioffe and Szegedy 2015, Figure 3: 13.3e6 steps against 2.1e6 (x5) and 2.7e6 (x30)",
            number="steps to that accuracy, BN over BN at a multiple of the rate; 0 if the latter never reaches it",
            unit="ratio",
            low=1.1,
            high=math.inf,
            tolerance="as for BN itself",
            refuted_if="no multiple saved steps",
        ),
        Claim(
            key="fourteen",
            text="BN with a higher learning rate needs 14 times fewer steps",
            source="Ioffe and Szegedy 2015, abstract; Figure 3: 31.0e6 over 2.1e6 is 14.8",
            number="steps to that accuracy, no BN over the faster of BN x5 and BN x30; 0 if neither reaches it",
            unit="ratio",
            low=7.0,
            high=28.0,
            tolerance="the limits are half of 14 and twice 14, because the network and the images are different",
            refuted_if="the ratio were outside these limits at every base rate",
        ),
        Claim(
            key="not-the-rate",
            text="the higher learning rate alone, without BN, saves nothing",
            source="Ioffe and Szegedy 2015, section 4.2.2: at x5 Inception reached machine infinity",
            number="steps to that accuracy, no BN over no BN x5; 0 if the latter never reaches it",
            unit="ratio",
            low=0.0,
            high=1.1,
            tolerance="as for BN itself",
            refuted_if="the network without BN also gained from five times the rate",
        ),
    )

    def resolve(self, config: Config) -> Config:
        """Fill in the data set."""
        return dataclasses.replace(config, data=datasets.chosen(config.data, "cifar10", "digits", folder=self.data_dir))

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train each setting from the same initial weights on the same batches."""
        data = self.resolve(config).data
        images, labels = datasets.load(f"{data}:train", batch_size=config.images, folder=self.data_dir)[0]
        images = (images - 0.5) / 0.25
        kept = len(labels) - min(config.held_out, len(labels) // 5)
        train, test = (images[:kept], labels[:kept]), (images[kept:], labels[kept:])
        values: dict[str, dict[str, float]] = {claim.key: {} for claim in self.claims}
        table: dict[str, list[float | str]] = {"base": [], "network": [], "step": [], "accuracy": []}
        known: dict[tuple[str, float], list[float]] = {}
        looks = [float(step) for step in range(config.every, config.steps + 1, config.every)]
        for index, base in enumerate(config.rates):
            curves = {}
            for place, (network, factor) in enumerate(_SETTINGS):
                key = network, round(base * factor, 12)
                if key not in known:
                    known[key] = _train(config, network, key[1], seed, train, test)
                curves[network, factor] = known[key]
                table["base"] += [f"base rate {base:g}"] * len(looks)
                table["network"] += [f"{network} x{factor}"] * len(looks)
                table["step"] += looks
                table["accuracy"] += known[key]
                tick((index + (place + 1) / len(_SETTINGS)) / len(config.rates))
            target = max(curves[_BASELINE])
            steps = {setting: _first(curve, target, looks) for setting, curve in curves.items()}
            for claim, numbers in _numbers(steps, f"rate {base:g}").items():
                values[claim] |= numbers
        return Observation(
            values=values,
            table=table,
            notes=(
                f"data: {data}, {len(train[1])} images to train on and {len(test[1])} held out from the training split",
                f"the accuracy to reach is the best of the network without BN in {config.steps} steps",
                "a low base rate leaves more room for a gain: compare the base rates",
            ),
        )

    def figure(self) -> Figure:
        """Draw the accuracy over the steps, with a line per setting and a panel per base rate."""
        return Figure(
            title="Held-out accuracy during training; x5 and x30 are multiples of the base learning rate",
            mark=Mark.LINE,
            x=Axis("step", "steps"),
            y=Axis("accuracy", "held-out accuracy"),
            series="network",
            panel="base",
            low="low",
            high="high",
        )


def _build(config: Config, network: str, shape: Sequence[int], seed: int) -> nn.Sequential:
    """Return a small convolutional network. The initial weights are the same with and without BN."""
    with seeded(seed):
        layers: list[nn.Module] = []
        inputs, side = shape[0], shape[-1]
        for outputs in config.channels:
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, stride=2))
            if network == "BN":
                layers.append(BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            inputs, side = outputs, (side + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, 10))


def _train(config: Config, network: str, rate: float, seed: int, train: Batch, test: Batch) -> list[float]:
    """Return the held-out accuracy at each measurement."""
    model = _build(config, network, train[0].shape[1:], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches = minibatches(train, config.batch, torch.Generator().manual_seed(seed))
    curve = []
    for step, batch in enumerate(islice(batches, config.steps), start=1):
        take_step(model, [batch], optimizer)
        if step % config.every == 0:
            curve.append(accuracy(model, test))
    return curve


def _first(curve: Sequence[float], target: float, looks: Sequence[float]) -> float:
    """Return the step of the first measurement that reaches the target; inf if there is none."""
    return next((step for step, value in zip(looks, curve, strict=True) if value >= target), math.inf)


def _numbers(steps: dict[tuple[str, int], float], base: str) -> dict[str, dict[str, float]]:
    """Return the numbers of each claim at one base rate."""
    plain, normalised = steps[_BASELINE], steps["BN", 1]
    return {
        "fewer": {base: _ratio(plain, normalised)},
        "higher-rate": {f"{base} x{factor}": _ratio(normalised, steps["BN", factor]) for factor in (5, 30)},
        "fourteen": {base: _ratio(plain, min(steps["BN", 5], steps["BN", 30]))},
        "not-the-rate": {base: _ratio(plain, steps["no BN", 5])},
    }


def _ratio(before: float, after: float) -> float:
    return 0.0 if math.isinf(after) else before / after
