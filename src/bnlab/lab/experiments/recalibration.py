"""recalibration: what running statistics cost, and how many images in what batches mend them."""

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
"""Images per forward pass of a recalibration, where nothing else is said: Wu and Johnson 2021, table 2."""

_STEP = 128
"""Images per step, where few are normalised together."""

_FORWARDED = 1200
"""Images whose statistics are compared by the size of the batch: all sizes must divide it."""

_FEW, _USUAL, _MANY = 4, 32, 16
"""Images normalised together: where population statistics should do worse, the paper's usual, and where not worse."""

_COUNTS = {10: "ten", 1000: "thousand"}
_SIZES = {2: "pairs", 100: "hundred"}


@dataclass(frozen=True)
class Config:
    """Settings of recalibration.

    Attributes:
        width: Channels of the first convolution.
        batch_size: Images per step, those of a large batch.
        epochs: Passes over the training data.
        learning_rate: At the start; it falls to 0.
        early: Passes after which the unfinished network is measured, up to a third of all.
        images: How many images the statistics are recomputed from; 10 and 1000 must be among them.
        draws: How often these are drawn anew; errors are means over the draws.
        forwarded: Images per forward pass, while 1200 are used; 2 and 100 must be among them.
        normalized: Images that are normalised together in training, a step being taken on 128; one must be at most 4
            and one at least 16.
        passes: Passes over the training data of these networks.
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
    """Recomputing the running statistics mends a network that is not converged; a thousand images are enough."""

    name = "recalibration"
    source = "Wu and Johnson 2021, tables 1 and 2, figure 5"
    quick = Config()
    full = Config(width=32, epochs=80, early=(4, 8, 16, 24), draws=30, normalized=(2, 4, 8, 16, 32, 64, 128), passes=20)
    claims = (
        Claim(
            key="early",
            text="before convergence and with a large batch, running statistics cost accuracy",
            source="Wu and Johnson 2021, table 1: 13.4 points in epoch 30 of 100 at batch 8192",
            number="test error with running statistics over that with recomputed ones, up to a third of the training",
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
            number="test error with running statistics over that with recomputed ones, after the last step",
            unit="points",
            low=-1.0,
            high=1.0,
            tolerance="1 point is 4 of 449 test images, which turn with the order of the last batches",
            refuted_if="the moving average still lagged although the weights stand still",
        ),
        Claim(
            key="ten",
            text="10 images are too few",
            source="Wu and Johnson 2021, table 1: 4.5 to 6 points",
            number="mean test error with statistics of 10 images over that with those of all",
            unit="points",
            low=0.5,
            high=math.inf,
            tolerance="the mean over the draws is good to about 0.2 points; a whole error here is about 2",
            refuted_if="10 images were as good as all",
        ),
        Claim(
            key="thousand",
            text="1000 images are as good as all",
            source="Wu and Johnson 2021, table 1: 0.02 to 0.04 points",
            number="mean test error with statistics of 1000 images over that with those of all",
            unit="points",
            low=-0.5,
            high=0.5,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="more images still helped",
        ),
        Claim(
            key="pairs",
            text="the same images forwarded 2 at a time give worse statistics",
            source="Wu and Johnson 2021, table 2: 2.4 to 5.3 points",
            number="test error with statistics forwarded 2 at a time over that with exact ones, layer by layer",
            unit="points",
            low=1.0,
            high=math.inf,
            tolerance="1 point is 4 of 449 test images",
            refuted_if="the size of the forwarded batch made no difference",
        ),
        Claim(
            key="hundred",
            text="forwarded 100 at a time they are as good as exact ones",
            source="Wu and Johnson 2021, table 2: nothing is gained above 100",
            number="test error with statistics forwarded 100 at a time over that with exact ones, layer by layer",
            unit="points",
            low=-1.0,
            high=1.0,
            tolerance="1 point is 4 of 449 test images",
            refuted_if="the noise of batches of 100 still reached the later layers",
        ),
        Claim(
            key="inconsistent",
            text="trained on 2 or 4 images together, population statistics do worse than those of such batches",
            source="Wu and Johnson 2021, figure 5: 6.5 points at 2, 0.9 at 4",
            number="test error with population statistics over that with batch statistics of the same size",
            unit="points",
            low=0.5,
            high=math.inf,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="population statistics did better there too",
        ),
        Claim(
            key="consistent",
            text="trained on 16 and more they do not do worse",
            source="Wu and Johnson 2021, figure 5: 1.1 to 1.5 points better",
            number="test error with population statistics over that with batch statistics of the same size",
            unit="points",
            low=-math.inf,
            high=0.5,
            tolerance="half a point is 2 of 449 test images",
            refuted_if="population statistics did worse there",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train a CNN with a large batch, then a CNN and a dense network for each number of images together."""
        generator = torch.Generator().manual_seed(seed)
        found = _Found({claim.key: {} for claim in self.claims}, [])
        model = _over_the_training(config, seed, generator, found)
        tick(0.1)
        _over_the_images(config, model, generator, found)
        tick(0.2)
        runs = [(kind, together) for together in config.normalized for kind in ("CNN", "dense")]
        for index, (kind, together) in enumerate(runs):
            with seeded(seed):
                network = cnn(width=config.width) if kind == "CNN" else dense(nn.BatchNorm1d)
            _over_the_batches(config, network, f"{together} together ({kind})", together, generator, found)
            tick(0.2 + 0.8 * (index + 1) / len(runs))
        names = ("panel", "statistics", "images", "error")
        return Observation(
            values=found.values,
            table={name: [row[at] for row in found.rows] for at, name in enumerate(names)},
            notes=(
                "the CNN normalises 16 or 64 values of each image together, the dense network one",
                "a step on 128 images is the mean gradient of its parts, so that only the normalisation changes",
            ),
        )

    def figure(self) -> Figure:
        """Draw the test error, a panel for each sweep, a line for each kind of statistics."""
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
class _Found:
    """What a run has found so far: numbers by claim and condition, and rows (panel, statistics, images, error)."""

    values: dict[str, dict[str, float]]
    rows: list[tuple[str, str, float, float]]


def _over_the_training(config: Config, seed: int, generator: torch.Generator, found: _Found) -> nn.Module:
    """Train with a large batch; compare running and recomputed statistics on the way and at the end."""
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
        found.rows.append(("over the training", "running", float(epoch), running))
        found.rows.append(("over the training", "recomputed", float(epoch), precise))
        key, condition = ("converged", "") if network is model else ("early", f"epoch {epoch}")
        found.values[key][condition] = running - precise
    return model


def _over_the_images(config: Config, model: nn.Module, generator: torch.Generator, found: _Found) -> None:
    """Recompute the statistics of the converged network from few images and many."""
    train_data, test_data = _digits()
    whole = _recalibrated(model, cut(train_data, _BY), test_data)
    for count in config.images:
        errors = []
        for _ in range(config.draws):
            images, labels = shuffled(train_data, generator)
            drawn = cut((images[:count], labels[:count]), min(count, _BY))
            errors.append(_recalibrated(model, drawn, test_data))
        found.rows.append(("over the images", "recomputed", float(count), fmean(errors)))
        if count in _COUNTS:
            found.values[_COUNTS[count]][""] = fmean(errors) - whole


def _over_the_batches(
    config: Config, model: nn.Module, name: str, together: int, generator: torch.Generator, found: _Found
) -> None:
    """Train with so many images normalised together; measure the three errors, and those by forwarded batch."""
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
        found.rows.append((panel, statistics, float(together), error))
    if together <= _FEW:
        found.values["inconsistent"][name] = population - unseen
    if together >= _MANY:
        found.values["consistent"][name] = population - unseen
    if together in (min(config.normalized), _USUAL):
        for size in config.forwarded:
            error = _recalibrated(model, cut(mixed, size), test_data)
            found.rows.append(("over the images forwarded", name, float(size), error))
            if size in _SIZES:
                found.values[_SIZES[size]][name] = error - population


def _digits() -> tuple[Batch, Batch]:
    """Return all images to train on, and all to test with."""
    return datasets.read("digits:train").batch(), datasets.read("digits:test").batch()


def _error(model: nn.Module, data: Batch) -> float:
    return 100 * (1 - accuracy(model, data))


def _recalibrated(model: nn.Module, batches: list[Batch], data: Batch, *, layerwise: bool = False) -> float:
    """Return the error after recomputing the statistics of a copy."""
    other = copy.deepcopy(model).eval()
    bnlab.recalibrate(other, batches, layerwise=layerwise)
    return _error(other, data)
