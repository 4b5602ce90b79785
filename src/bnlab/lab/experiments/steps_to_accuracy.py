"""steps-to-accuracy: the paper's "14 times fewer training steps", on a small network, with what the rate alone does."""

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
        data: "cifar10" or "digits"; "auto" for the first that is present.
        images: Images of the training split, at most; the last of them are held out.
        held_out: How many of these are held out, at most a fifth.
        channels: Of each convolution; each halves the image.
        batch: Images per step.
        steps: Of plain stochastic gradient descent.
        every: Steps from one look at the accuracy to the next.
        rates: Learning rates of the baseline without BN; each is a condition, with its multiples for the others.
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
    """How many steps BN saves on the way to the accuracy that a network without it reaches."""

    name = "steps-to-accuracy"
    source = "Ioffe and Szegedy 2015, section 4.2.2 and Figure 3"
    quick = Config()
    full = Config(
        images=50_000, held_out=5000, channels=(32, 64, 64), steps=20_000, every=50, rates=(0.005, 0.02, 0.05, 0.1)
    )
    claims = (
        Claim(
            key="fewer",
            text="with BN, and nothing else changed, the same accuracy takes fewer steps",
            source="Ioffe and Szegedy 2015, Figure 3: 31.0e6 steps against 13.3e6, a ratio of 2.3",
            number="steps to the best accuracy of the network without BN: no BN over BN; 0 if BN never reaches it",
            unit="ratio",
            low=1.1,
            high=math.inf,
            tolerance="a tenth, about what one look at the accuracy is apart from the next",
            refuted_if="BN needed as many steps or more",
        ),
        Claim(
            key="higher-rate",
            text="with a higher learning rate BN needs fewer steps still",
            source="Ioffe and Szegedy 2015, Figure 3: 13.3e6 steps against 2.1e6 (x5) and 2.7e6 (x30)",
            number="steps to that accuracy: BN over BN at a multiple of the rate; 0 if that never reaches it",
            unit="ratio",
            low=1.1,
            high=math.inf,
            tolerance="as for BN itself",
            refuted_if="no multiple saved steps",
        ),
        Claim(
            key="fourteen",
            text="14 times fewer steps",
            source="Ioffe and Szegedy 2015, abstract; Figure 3: 31.0e6 over 2.1e6 is 14.8",
            number="steps to that accuracy: no BN over the faster of BN x5 and BN x30; 0 if neither reaches it",
            unit="ratio",
            low=7.0,
            high=28.0,
            tolerance="of the order: from half of 14 to twice 14, since network and images are others",
            refuted_if="the ratio were of another order at every base rate",
        ),
        Claim(
            key="not-the-rate",
            text="the higher learning rate alone, without BN, saves nothing",
            source="Ioffe and Szegedy 2015, section 4.2.2: at x5 Inception reached machine infinity",
            number="steps to that accuracy: no BN over no BN x5; 0 if that never reaches it",
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
        """Train each setting from the same weights on the same batches."""
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
                f"data: {data}, {len(train[1])} images to train on and {len(test[1])} held out, of the training split",
                f"the accuracy to reach is the best that the network without BN shows in {config.steps} steps",
                "a low base rate leaves more to gain: compare the base rates",
            ),
        )

    def figure(self) -> Figure:
        """Draw the accuracy over the steps, a line per setting, a panel per base rate."""
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
    """Return a small convolutional network; the initial weights are the same with and without BN."""
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
    """Return the held-out accuracy at each look."""
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
    """Return the step of the first look at which the target is reached; inf if there is none."""
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
