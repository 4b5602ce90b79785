"""A classic mistake: a network whose running statistics barely change during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bnlab.lab import metrics
from bnlab.lab.datasets import digits
from bnlab.lab.small_networks import cnn, cut, seeded, shuffled, take_step
from bnlab.observe.passes.population import impose_batch_statistics

__all__ = ["Config", "TrainedNetwork", "build_network", "train"]

_MEASURED_BY = 64
"""Images per batch when the accuracy is measured. Batch statistics depend on this number."""


@dataclass(frozen=True)
class Config:
    """Settings of the training. The defaults take a few seconds on two cores.

    Attributes:
        momentum: The weight of the new batch. 0.001 is a common mistake: it is a Keras decay of 0.999, converted
            correctly, in a run that is a hundred times too short for it.
        epochs: The passes over the training data.
        batch_size: The images per batch.
        learning_rate: The learning rate of Adam.
        seed: The seed of the weights, the split and the order of the batches.
    """

    momentum: float = 0.001
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class TrainedNetwork:
    """The trained network, the number of held-out images, and the accuracy on them with both kinds of statistics."""

    model: nn.Module
    held_out: int
    accuracy_running: float
    accuracy_batch: float


def build_network(momentum: float = 0.1) -> nn.Sequential:
    """Return a small CNN for 8x8 images in ten classes, with three BN layers."""
    return cnn(lambda channels: nn.BatchNorm2d(channels, momentum=momentum))


def train(config: Config, *, progress: Callable[[int], None] = lambda _: None) -> TrainedNetwork:
    """Train on the handwritten digits that scikit-learn carries, and measure both accuracies on a held-out quarter.

    Args:
        config: The settings.
        progress: A function that is called with the number of finished epochs.

    Raises:
        MissingPackage: If scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = shuffled(digits.read_all().batch(), generator)
    quarter = len(labels) // 4
    held_out = cut((images[:quarter], labels[:quarter]), _MEASURED_BY, ragged=True)
    kept = images[quarter:], labels[quarter:]
    with seeded(config.seed):
        model = build_network(config.momentum)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    for epoch in range(config.epochs):
        model.train()
        for batch in cut(shuffled(kept, generator), config.batch_size, ragged=True):
            take_step(model, [batch], optimizer)
        progress(epoch + 1)
    model.eval()
    running = metrics.accuracy(model, held_out)
    with impose_batch_statistics(model):
        batch_statistics = metrics.accuracy(model, held_out)
    return TrainedNetwork(model, quarter, running, batch_statistics)
