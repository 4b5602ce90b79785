"""Small networks, batches of labelled images, and training, which the experiments on image data share."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlab.lab import metrics

__all__ = [
    "Batch",
    "Norm",
    "accuracy",
    "by_batch",
    "cnn",
    "cut",
    "dense",
    "minibatches",
    "seeded",
    "shuffled",
    "take_step",
    "train",
]

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (N, channels, height, width), and labels, int64 of shape (N,)."""

Norm = Callable[[int], nn.Module]
"""A function that returns the normalisation layer for a number of channels."""

_MAX_IMAGES = 1000
"""The largest number of images in a forward pass that measures the accuracy."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside the block, and restore their state afterwards."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def cnn(norm: Norm = nn.BatchNorm2d, *, width: int = 16, drop: float = 0.0) -> nn.Sequential:
    """Return a CNN of three convolutions, each followed by normalisation and ReLU, for images of one channel.

    Args:
        norm: The function that makes the normalisation layers.
        width: The channels of the first convolution. The others have twice as many.
        drop: The share that dropout drops before the second and third convolution, and so before their normalisation.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs) in enumerate(((1, width), (width, 2 * width), (2 * width, 2 * width)), start=1):
        if drop and index > 1:
            layers[f"drop{index}"] = nn.Dropout(drop)
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"bn{index}"] = norm(outputs)
        layers[f"relu{index}"] = nn.ReLU()
        if index == 2:
            layers["pool"] = nn.MaxPool2d(2)
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classify": nn.Linear(2 * width, 10)}
    return nn.Sequential(layers)


def dense(norm: Norm, *, width: int = 64) -> nn.Sequential:
    """Return three dense layers for 8x8 images, each followed by normalisation and ReLU.

    An image has one value per channel.

    Args:
        norm: The function that makes the normalisation layers.
        width: The channels of each layer.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, width, width):
        layers += [nn.Linear(inputs, width, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cut(data: Batch, size: int, *, ragged: bool = False) -> list[Batch]:
    """Return the data in batches, in their order. An incomplete last batch is dropped unless `ragged` is set."""
    images, labels = data
    end = len(labels) if ragged else len(labels) // size * size
    return [(images[at : at + size], labels[at : at + size]) for at in range(0, end, size)]


def shuffled(data: Batch, generator: torch.Generator) -> Batch:
    """Return the data in a random order."""
    order = torch.randperm(len(data[1]), generator=generator)
    return data[0][order], data[1][order]


def minibatches(data: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end, in a new order for each pass over the data, without incomplete batches."""
    images, labels = data
    size = min(size, len(labels))
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(order) - size + 1, size):
            part = order[at : at + size]
            yield images[part], labels[part]


def take_step(model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> None:
    """Take a step on the mean gradient of batches, each with its own forward pass."""
    optimizer.zero_grad()
    for images, labels in batches:
        loss = cross_entropy(model(images), labels) / len(batches)
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    *,
    learning_rate: float,
    before: Callable[[int], None] = lambda _: None,
) -> None:
    """Train by SGD with momentum 0.9 and a learning rate that falls to 0 along a cosine.

    Args:
        model: The model. It is in train mode afterwards.
        steps: The batches of each step.
        learning_rate: The learning rate at the start.
        before: A function that is called before each step with the number of the step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step, batches in enumerate(steps):
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        take_step(model, batches, optimizer)


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> float:
    """Return the share of images whose largest output is that of their label, in eval mode.

    An output that is not finite counts as a miss. The mode of the model does not change.
    """
    mode = model.training
    model.eval()
    try:
        scores = torch.cat([model(part) for part in torch.split(data[0], _MAX_IMAGES)])
    finally:
        model.train(mode)
    hit = (scores.argmax(1) == data[1]) & scores.isfinite().all(1)
    return float(hit.double().mean())


def by_batch(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of right answers if every batch is normalised as in training. The model does not change.

    In a copy of the model, the BN layers are in train mode, and everything else is in eval mode.
    """
    other = copy.deepcopy(model).eval()
    for layer in other.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of them all
            layer.train()
    return metrics.accuracy(other, list(batches))
