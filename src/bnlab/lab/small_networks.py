"""Small networks, labelled images in batches, and training: what the experiments on image data share."""

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
"""Makes the normalisation layer for that many channels."""

_MOST_AT_ONCE = 1000
"""Images in a forward pass that measures the accuracy."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is random come from a seed for as long as the block runs."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def cnn(norm: Norm = nn.BatchNorm2d, *, width: int = 16, drop: float = 0.0) -> nn.Sequential:
    """Return a CNN of three convolutions, each followed by normalisation and ReLU, for images of one channel.

    Args:
        norm: Makes the normalisation layers.
        width: Channels of the first convolution; the others have twice as many.
        drop: Share that is dropped before the second and third convolution, and so before their normalisation.
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
    """Return three dense layers for 8x8 images, each followed by normalisation and ReLU: one value per channel.

    Args:
        norm: Makes the normalisation layers.
        width: Channels of each layer.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, width, width):
        layers += [nn.Linear(inputs, width, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cut(data: Batch, size: int, *, ragged: bool = False) -> list[Batch]:
    """Return the data in batches, in their order; what does not fill one is left out unless `ragged` is set."""
    images, labels = data
    end = len(labels) if ragged else len(labels) // size * size
    return [(images[at : at + size], labels[at : at + size]) for at in range(0, end, size)]


def shuffled(data: Batch, generator: torch.Generator) -> Batch:
    """Return the data in another order."""
    order = torch.randperm(len(data[1]), generator=generator)
    return data[0][order], data[1][order]


def minibatches(data: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end: the data in a new order each time, what does not fill a batch left out."""
    images, labels = data
    size = min(size, len(labels))
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(order) - size + 1, size):
            part = order[at : at + size]
            yield images[part], labels[part]


def take_step(model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> None:
    """Take a step on the mean of the gradients of batches, each of which has its own forward pass."""
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
        model: Is left in train mode.
        steps: The batches of each step.
        learning_rate: At the start.
        before: Called before each step with its number; a snapshot may be taken there.
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

    An output that is not finite counts as a miss. The model comes back in the mode it was in.
    """
    mode = model.training
    model.eval()
    try:
        scores = torch.cat([model(part) for part in torch.split(data[0], _MOST_AT_ONCE)])
    finally:
        model.train(mode)
    hit = (scores.argmax(1) == data[1]) & scores.isfinite().all(1)
    return float(hit.double().mean())


def by_batch(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of right answers where every batch is normalised as in training; the model is left as it was.

    Batch normalisation layers are in train mode, so that they take the statistics as they do there, and nothing else.
    """
    other = copy.deepcopy(model).eval()
    for layer in other.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of them all
            layer.train()
    return metrics.accuracy(other, list(batches))
