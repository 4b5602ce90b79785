"""grouped-batches: networks learn to recognise batches of few classes by their statistics. Three cures are tested."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnlab
from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, by_batch, cut, dense, seeded, shuffled, train
from bnlab.nn import BatchRenorm1d, GhostBatchNorm1d, RenormSchedule
from bnlab.records import Axis, Figure, Mark

__all__ = ["Config", "GroupedBatches"]

_SAME, _ANEW = "always the same classes", "classes drawn anew"
_MIN_LOSS = 0.02

_CLAIM_LIMITS = {
    "unit": "share",
    "low": 0.8,
    "high": math.inf,
    "tolerance": "two seeds differ by about a fifth of the loss; a loss below 0.02 counts as 0.02",
    "refuted_if": "the cure recovered less than four fifths of the loss",
}
_RECOVERED = "accuracy in eval mode; 0 is that of grouped batches, 1 is theirs with batch statistics"

_RUNNING, _RECALIBRATED = "eval mode", "eval mode, recalibrated"
_LIKE, _RANDOM = "batches like these", "batches at random"


@dataclass(frozen=True)
class Config:
    """Settings of grouped-batches.

    Attributes:
        classes: The classes of each batch, a divisor of 10.
        images: The images of each class in a batch.
        epochs: The passes over the training data.
        width: The channels of each of the three dense layers.
        learning_rate: The learning rate at the start; it falls to 0.
    """

    classes: int = 2
    images: int = 16
    epochs: int = 30
    width: int = 64
    learning_rate: float = 0.1

    @property
    def together(self) -> int:
        """Images that are normalised together."""
        return self.classes * self.images


class GroupedBatches(Experiment[Config]):
    """A network trained on batches of few classes fails in eval mode. Shuffling, ghost batches and renorm help."""

    name = "grouped-batches"
    source = "Ioffe 2017 (arXiv 1702.03275), section 4.3; Wu and Johnson 2021 (arXiv 2105.07576), figure 8"
    quick = Config()
    full = Config(epochs=120, width=256)
    claims = (
        Claim(
            key="collapse",
            text="trained on batches of few classes, a network fails with population statistics",
            source="Wu and Johnson 2021, figure 8: 28 points; Ioffe 2017, section 4.3: 9.5 points",
            number="accuracy with the statistics of batches like those of training, minus accuracy in eval mode",
            unit="fraction",
            low=0.05,
            high=math.inf,
            tolerance="half of the loss that Ioffe 2017 reports",
            refuted_if="eval mode were as good as batches like those of training",
        ),
        Claim(
            key="not-the-buffers",
            text="recomputing the statistics does not help: the weights have learned to use the batch",
            source="Wu and Johnson 2021, figure 8, whose population statistics are exact",
            number=f"share recovered by exact statistics of shuffled data, layer by layer ({_RECOVERED})",
            unit="share",
            low=-math.inf,
            high=0.5,
            tolerance="the moving average leaves out the variance between batches, a smaller part of the loss",
            refuted_if="exact statistics recovered most of the loss",
        ),
        Claim(
            key="ghost",
            text="ghost batches that hold every class prevent the failure",
            source="Ioffe 2017, section 4.3: 77.4 of 78.3 %; Wu and Johnson 2021, figure 8",
            number=f"share recovered ({_RECOVERED})",
            **_CLAIM_LIMITS,  # type: ignore[arg-type]
        ),
        Claim(
            key="renorm",
            text="batch renormalization on the same batches prevents the failure",
            source="Ioffe 2017, section 4.3: 78.5 %, as good as on batches drawn at random",
            number=f"share recovered ({_RECOVERED})",
            **_CLAIM_LIMITS,  # type: ignore[arg-type]
        ),
        Claim(
            key="shuffle",
            text="shuffling prevents the failure",
            source="Wu and Johnson 2021, figure 8",
            number=f"share recovered ({_RECOVERED})",
            **_CLAIM_LIMITS,  # type: ignore[arg-type]
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train on the same images, in steps that hold all classes equally. Only the normalised batches differ."""
        data = _Data(*(datasets.read(f"digits:{split}").batch() for split in ("train", "test")))
        schemes = (("grouped", False), ("grouped", True), ("ghost", False), ("renorm", False), ("shuffle", False))
        accuracies: dict[str, dict[str, float]] = {}
        for index, (scheme, anew) in enumerate(schemes):
            name = _ANEW if anew else scheme if scheme != "grouped" else _SAME
            accuracies[name] = _accuracies(scheme, config, seed, data, anew=anew)
            tick((index + 1) / len(schemes))
        same = accuracies[_SAME]
        lost = max(same[_LIKE] - same[_RUNNING], _MIN_LOSS)
        rows = [(name, *row) for name, by_statistics in accuracies.items() for row in by_statistics.items()]
        return Observation(
            values={
                "collapse": {name: accuracies[name][_LIKE] - accuracies[name][_RUNNING] for name in (_SAME, _ANEW)},
                "not-the-buffers": {"": (same[_RECALIBRATED] - same[_RUNNING]) / lost},
                **{
                    cure: {"": (accuracies[cure][_RUNNING] - same[_RUNNING]) / lost}
                    for cure in ("ghost", "renorm", "shuffle")
                },
            },
            table={
                "training": [row[0] for row in rows],
                "statistics": [row[1] for row in rows],
                "accuracy": [row[2] for row in rows],
            },
            notes=(
                "each step is the mean gradient of batches that together hold all ten classes equally",
                f"the cures are measured with {_SAME} in each batch",
                "network and classes were chosen because they fail: in single trials a small CNN hardly failed",
            ),
        )

    def figure(self) -> Figure:
        """Draw the accuracy, with a bar for each kind of statistics and a panel for each way of training."""
        return Figure(
            title="Accuracy after training on batches of few classes, and with each cure",
            mark=Mark.BAR,
            x=Axis("statistics", "normalised with"),
            y=Axis("accuracy", "accuracy"),
            panel="training",
        )


@dataclass(frozen=True)
class _Data:
    train: Batch
    test: Batch


def _accuracies(scheme: str, config: Config, seed: int, data: _Data, *, anew: bool) -> dict[str, float]:
    """Train by one scheme. Return the accuracy with each kind of statistics."""
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = dense(_norm(scheme, config.together), width=config.width)
    steps = [
        _arranged(scheme, groups, config.together, generator)
        for _ in range(config.epochs)
        for groups in _groups(data.train, config, generator, anew=anew)
    ]
    train(model, steps, learning_rate=config.learning_rate, before=_schedule(model, len(steps)))
    like = [batch for groups in _groups(data.test, config, generator, anew=anew) for batch in groups]
    random = cut(shuffled(data.test, generator), config.together)
    exact = copy.deepcopy(model).eval()
    bnlab.recalibrate(exact, cut(shuffled(data.train, generator), 100), layerwise=True)
    return {
        _RUNNING: accuracy(model, data.test),
        _RECALIBRATED: accuracy(exact, data.test),
        _LIKE: by_batch(model, like),
        _RANDOM: by_batch(model, random),
    }


def _norm(scheme: str, together: int) -> Callable[[int], nn.Module]:
    if scheme == "ghost":
        return lambda channels: GhostBatchNorm1d(channels, ghost_size=together)
    if scheme == "renorm":
        return lambda channels: BatchRenorm1d(channels, r_max=1.0, d_max=0.0, momentum=0.05)
    return nn.BatchNorm1d


def _schedule(model: nn.Module, steps: int) -> Callable[[int], None]:
    """Return a callback for each step: plain BN for a tenth of the training, full limits from a third on."""
    schedule = RenormSchedule(warmup=steps // 10, r_end=steps // 3, d_end=steps // 3)
    return lambda step: schedule.apply(model, step)


def _groups(data: Batch, config: Config, generator: torch.Generator, *, anew: bool) -> list[list[Batch]]:
    """Return steps of batches with a few classes each. A step holds all classes equally."""
    members = [(data[1] == label).nonzero().flatten() for label in range(10)]
    members = [part[torch.randperm(len(part), generator=generator)] for part in members]
    steps = []
    for at in range(0, min(map(len, members)) - config.images + 1, config.images):
        labels = torch.randperm(10, generator=generator) if anew else torch.arange(10)
        chosen = [
            torch.cat([members[int(label)][at : at + config.images] for label in part])
            for part in torch.split(labels, config.classes)
        ]
        steps.append([(data[0][part], data[1][part]) for part in chosen])
    return steps


def _arranged(scheme: str, groups: list[Batch], together: int, generator: torch.Generator) -> list[Batch]:
    """Return the images of a step, split into the batches of a scheme."""
    if scheme in ("grouped", "renorm"):
        return groups
    images, labels = (torch.cat(parts) for parts in zip(*groups, strict=True))
    if scheme == "shuffle":
        return cut(shuffled((images, labels), generator), together)
    return [(_interleaved(images, len(groups)), _interleaved(labels, len(groups)))]


def _interleaved(values: Tensor, parts: int) -> Tensor:
    """Distribute values that are sorted by class over `parts` parts, and return the parts one after the other."""
    return torch.cat([values[part::parts] for part in range(parts)])
