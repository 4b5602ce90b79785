"""recalibration: what running statistics cost, and how many images in which batches repair them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

import bnlab
from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, by_batch, cnn, cut, dense, seeded, shuffled, train
from bnlab.records import Axis, Figure, Mark

__all__ = ["Config", "Recalibration"]

_BY = 100
"""Default number of images per forward pass of a recalibration: Wu and Johnson 2021, table 2."""

_STEP = 128
"""Images per step, where only a few are normalised together."""

_FORWARDED = 1200
"""Number of images in the comparison of batch sizes. Every size must divide it."""

_FEW, _USUAL, _MANY = 4, 32, 16
"""Images normalised together. Population statistics should do worse up to _FEW and not worse from _MANY on."""

_COUNTS = {10: "ten", 1000: "thousand"}
_SIZES = {2: "pairs", 100: "hundred"}


@dataclass(frozen=True)
class Config:
    """Settings of recalibration.

    Attributes:
        width: The channels of the first convolution.
        batch_size: The images per step of the training with a large batch.
        epochs: The passes over the training data.
        learning_rate: The learning rate at the start; it falls to 0.
        early: The passes after which the unfinished network is measured, up to a third of all.
        images: The numbers of images that the statistics are recomputed from; 10 and 1000 must be among them.
        draws: How often the images are drawn again; errors are means over the draws.
        forwarded: The images per forward pass, of 1200 in all; 2 and 100 must be among them.
        normalized: The images that are normalised together in training, at 128 images per step. One number must be at
            most 4, and one at least 16.
        passes: The passes over the training data of these networks.
    """

    width: int = 8
    batch_size: int = 512
    epochs: int = 40
    learning_rate: float = 0.5
    early: tuple[int, ...] = (4, 8, 12)
    images: tuple[int, ...] = (10, 30, 100, 300, 1000)
    draws: int = 10
    forwarded: tuple[int, ...] = (2, 4, 10, 100, 400)
    normalized: tuple[int, ...] = (2, 4, 32, 128)
    passes: int = 4


class Recalibration(Experiment[Config]):
    """Recomputing the running statistics repairs a network that has not converged. A thousand images are enough."""

    name = "recalibration"
    source = "Wu and Johnson 2021 (arXiv 2105.07576), tables 1 and 2, figure 5"
    quick = Config()
    full = Config(width=32, epochs=80, early=(4, 8, 16, 24), draws=30, normalized=(2, 4, 8, 16, 32, 64, 128), passes=20)
    claims = (
        Claim(
            key="early",
            text="before convergence and with a large batch, running statistics cost accuracy",
            source="Wu and Johnson 2021, table 1: 13.4 points in epoch 30 of 100 at batch 8192",
            number="test error with running statistics minus that with recomputed ones, up to a third of the training",
            unit="points",
            low=2.0,
            high=math.inf,
            tolerance="2 points are 9 of 449 test images",
            refuted_if="the moving average were as good as the recomputed statistics",
        ),
        Claim(
            key="converged",
            text="at convergence running statistics cost nothing",
            source="Wu and Johnson 2021, table 1: 0.2 to 0.3 points in epoch 100",
            number="test error with running statistics minus that with recomputed ones, after the last step",
            unit="points",
            low=-1.0,
            high=1.0,
            tolerance="1 point is 4 of 449 test images, which depend on the order of the last batches",
            refuted_if="the moving average still lagged although the weights no longer change",
        ),
        Claim(
            key="ten",
            text="10 images are too few",
            source="Wu and Johnson 2021, table 1: 4.5 to 6 points",
            number="mean test error with statistics of 10 images, minus test error with statistics of all",
            unit="points",
            low=0.5,
            high=math.inf,
            tolerance="the mean over the draws has an error of about 0.2 points; the test error itself is about 2",
            refuted_if="10 images were as good as all",
        ),
        Claim(
            key="thousand",
            text="1000 images are as good as all",
            source="Wu and Johnson 2021, table 1: 0.02 to 0.04 points",
            number="mean test error with statistics of 1000 images, minus test error with statistics of all",
            unit="points",
            low=-0.5,
            high=0.5,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="more than 1000 images still helped",
        ),
        Claim(
            key="pairs",
            text="forwarding the same images 2 at a time gives worse statistics",
            source="Wu and Johnson 2021, table 2: 2.4 to 5.3 points",
            number="test error with statistics from 2 images at a time, minus that with exact ones, layer by layer",
            unit="points",
            low=1.0,
            high=math.inf,
            tolerance="1 point is 4 of 449 test images",
            refuted_if="the size of the forwarded batch made no difference",
        ),
        Claim(
            key="hundred",
            text="forwarding the images 100 at a time gives statistics as good as exact ones",
            source="Wu and Johnson 2021, table 2: larger batches than 100 gain nothing",
            number="test error with statistics from 100 images at a time, minus that with exact ones, layer by layer",
            unit="points",
            low=-1.0,
            high=1.0,
            tolerance="1 point is 4 of 449 test images",
            refuted_if="the noise of batches of 100 still reached the later layers",
        ),
        Claim(
            key="inconsistent",
            text="after training on 2 or 4 images together, population statistics do worse than batch statistics",
            source="Wu and Johnson 2021, figure 5: 6.5 points at 2, 0.9 at 4",
            number="test error with population statistics minus that with batch statistics of the same size",
            unit="points",
            low=0.5,
            high=math.inf,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="population statistics did better than batches of this size",
        ),
        Claim(
            key="consistent",
            text="after training on 16 or more images together, population statistics do not do worse",
            source="Wu and Johnson 2021, figure 5: 1.1 to 1.5 points better",
            number="test error with population statistics minus that with batch statistics of the same size",
            unit="points",
            low=-math.inf,
            high=0.5,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="population statistics did worse than batches of this size",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train a CNN with a large batch, then a CNN and a dense network for each number of images together."""
        generator = torch.Generator().manual_seed(seed)
        measurements = _Measurements({claim.key: {} for claim in self.claims}, [])
        model = _over_the_training(config, seed, generator, measurements)
        tick(0.1)
        _over_the_images(config, model, generator, measurements)
        tick(0.2)
        runs = [(kind, together) for together in config.normalized for kind in ("CNN", "dense")]
        for index, (kind, together) in enumerate(runs):
            with seeded(seed):
                network = cnn(width=config.width) if kind == "CNN" else dense(nn.BatchNorm1d)
            _over_the_batches(config, network, f"{together} together ({kind})", together, generator, measurements)
            tick(0.2 + 0.8 * (index + 1) / len(runs))
        names = ("panel", "statistics", "images", "error")
        return Observation(
            values=measurements.values,
            table={name: [row[at] for row in measurements.rows] for at, name in enumerate(names)},
            notes=(
                "the CNN normalises 16 or 64 values of each image together, and the dense network one",
                "a step on 128 images takes the mean gradient of its parts, and only the normalisation differs",
            ),
        )

    def figure(self) -> Figure:
        """Draw the test error, with a panel for each sweep and a line for each kind of statistics."""
        return Figure(
            title="Test error with running, recomputed and batch statistics",
            mark=Mark.LINE,
            x=Axis("images", "epochs, or images", log=True),
            y=Axis("error", "error, %"),
            series="statistics",
            panel="panel",
            low="low",
            high="high",
        )


@dataclass(frozen=True)
class _Measurements:
    """The measurements of a run: numbers by claim and condition, and rows (panel, statistics, images, error)."""

    values: dict[str, dict[str, float]]
    rows: list[tuple[str, str, float, float]]


def _over_the_training(config: Config, seed: int, generator: torch.Generator, measurements: _Measurements) -> nn.Module:
    """Train with a large batch. Compare running and recomputed statistics during and after the training."""
    train_data, test_data = _digits()
    with seeded(seed):
        model = cnn(width=config.width)
    steps = [[batch] for _ in range(config.epochs) for batch in cut(shuffled(train_data, generator), config.batch_size)]
    wanted = {len(steps) * epoch // config.epochs: epoch for epoch in config.early}
    kept: dict[int, nn.Module] = {}

    def keep(step: int) -> None:
        if step in wanted:
            kept[wanted[step]] = copy.deepcopy(model)

    train(model, steps, learning_rate=config.learning_rate, before=keep)
    kept[config.epochs] = model
    for epoch, network in kept.items():
        running = _error(network, test_data)
        precise = _recalibrated(network, cut(shuffled(train_data, generator), _BY), test_data)
        measurements.rows.append(("over the training", "running", float(epoch), running))
        measurements.rows.append(("over the training", "recomputed", float(epoch), precise))
        key, condition = ("converged", "") if network is model else ("early", f"epoch {epoch}")
        measurements.values[key][condition] = running - precise
    return model


def _over_the_images(config: Config, model: nn.Module, generator: torch.Generator, measurements: _Measurements) -> None:
    """Recompute the statistics of the converged network from different numbers of images."""
    train_data, test_data = _digits()
    whole = _recalibrated(model, cut(train_data, _BY), test_data)
    for count in config.images:
        errors = []
        for _ in range(config.draws):
            images, labels = shuffled(train_data, generator)
            drawn = cut((images[:count], labels[:count]), min(count, _BY))
            errors.append(_recalibrated(model, drawn, test_data))
        measurements.rows.append(("over the images", "recomputed", float(count), fmean(errors)))
        if count in _COUNTS:
            measurements.values[_COUNTS[count]][""] = fmean(errors) - whole


def _over_the_batches(
    config: Config, model: nn.Module, name: str, together: int, generator: torch.Generator, measurements: _Measurements
) -> None:
    """Train with `together` images normalised together. Measure three errors, and errors by forwarded batch."""
    train_data, test_data = _digits()
    steps = [
        cut(whole, together)
        for _ in range(config.passes)
        for whole in cut(shuffled(train_data, generator), max(_STEP, together))
    ]
    train(model, steps, learning_rate=0.2)
    images, labels = shuffled(train_data, generator)
    mixed = images[:_FORWARDED], labels[:_FORWARDED]
    population = _recalibrated(model, cut(mixed, _BY), test_data, layerwise=True)
    seen = 100 * (1 - by_batch(model, cut(mixed, together)))
    unseen = 100 * (1 - by_batch(model, cut(shuffled(test_data, generator), together)))
    panel = f"over the images together{name[name.index(' (') :]}"
    for statistics, error in (("train, batch", seen), ("test, batch", unseen), ("test, population", population)):
        measurements.rows.append((panel, statistics, float(together), error))
    if together <= _FEW:
        measurements.values["inconsistent"][name] = population - unseen
    if together >= _MANY:
        measurements.values["consistent"][name] = population - unseen
    if together in (min(config.normalized), _USUAL):
        for size in config.forwarded:
            error = _recalibrated(model, cut(mixed, size), test_data)
            measurements.rows.append(("over the images forwarded", name, float(size), error))
            if size in _SIZES:
                measurements.values[_SIZES[size]][name] = error - population


def _digits() -> tuple[Batch, Batch]:
    """Return all training images and all test images."""
    return datasets.read("digits:train").batch(), datasets.read("digits:test").batch()


def _error(model: nn.Module, data: Batch) -> float:
    return 100 * (1 - accuracy(model, data))


def _recalibrated(model: nn.Module, batches: list[Batch], data: Batch, *, layerwise: bool = False) -> float:
    """Return the error of a copy whose statistics are recomputed."""
    other = copy.deepcopy(model).eval()
    bnlab.recalibrate(other, batches, layerwise=layerwise)
    return _error(other, data)
