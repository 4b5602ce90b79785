"""A classic mishap: a network trained so that its running statistics hardly move."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlab.lab.datasets import digits
from bnlab.observe.passes.population import impose_batch_statistics

__all__ = ["Config", "Outcome", "build_network", "train"]


@dataclass(frozen=True)
class Config:
    """How the network is trained; the defaults take a few seconds on two cores.

    Attributes:
        momentum: Weight of the new batch. 0.001 is a common slip: a Keras decay of 0.999, carried over right, in a run
            that is a hundred times too short for it.
        epochs: Passes over the training data.
        batch_size: Images per batch.
        learning_rate: Of Adam.
        seed: Of the weights, the split and the order of the batches.
    """

    momentum: float = 0.001
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The trained network, the number of held-out images, and the accuracy on them with either statistics."""

    model: nn.Module
    held_out: int
    accuracy_running: float
    accuracy_batch: float


def build_network(momentum: float = 0.1) -> nn.Sequential:
    """Return a small CNN for 8x8 images in ten classes, with three BN layers."""
    layers: dict[str, nn.Module] = {}
    for index, (inputs, outputs) in enumerate([(1, 16), (16, 32), (32, 32)], start=1):
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(outputs, momentum=momentum)
        layers[f"relu{index}"] = nn.ReLU()
        if index == 2:
            layers["pool"] = nn.MaxPool2d(2)
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classify": nn.Linear(32, 10)}
    return nn.Sequential(OrderedDict(layers))


def train(config: Config, *, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Train on the handwritten digits that scikit-learn carries, and measure both accuracies on a held-out quarter.

    Args:
        config: How.
        progress: Called with the number of finished epochs.

    Raises:
        MissingPackage: If scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = _digits()
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[: len(order) // 4], order[len(order) // 4 :]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        model = build_network(config.momentum)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    for epoch in range(config.epochs):
        model.train()
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        for start in range(0, len(shuffled), config.batch_size):
            batch = shuffled[start : start + config.batch_size]
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        progress(epoch + 1)
    model.eval()
    running = _accuracy(model, images[held_out], labels[held_out])
    with impose_batch_statistics(model):
        batch_statistics = _accuracy(model, images[held_out], labels[held_out])
    return Outcome(model, len(held_out), running, batch_statistics)


def _digits() -> tuple[Tensor, Tensor]:
    whole = digits.read_all()
    return whole.pixels.to(torch.float32) / whole.white, whole.labels


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, in batches of 64: batch statistics depend on the size."""
    starts = range(0, len(images), 64)
    right = [(model(images[at : at + 64]).argmax(1) == labels[at : at + 64]).float() for at in starts]
    return float(torch.cat(right).mean())
