"""What the experiments on the handwritten digits share: small networks, seeded training, accuracies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnlab.lab import metrics
from bnlab.lab.datasets import digits

__all__ = [
    "Batch",
    "Norm",
    "accuracy",
    "build",
    "build_dense",
    "by_batch",
    "cut",
    "read",
    "seeded",
    "shuffled",
    "train",
]

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (N, 1, 8, 8), and labels, int64 of shape (N,)."""

Norm = Callable[[int], nn.Module]
"""Makes the normalisation layer for that many channels."""


def read(split: str) -> Batch:
    """Return all images and labels of "train", 1348, or "test", 449."""
    part = digits.read(split)
    return part.pixels.to(torch.float32) / part.white, part.labels


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is random come from a seed for as long as the block runs."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield


def build(norm: Norm, *, width: int, drop: float = 0.0) -> nn.Sequential:
    """Return a CNN of three convolutions, each followed by normalisation and ReLU; the keys are the same for any norm.

    Args:
        norm: Makes the normalisation layers.
        width: Channels of the first convolution; the others have twice as many.
        drop: Share that is dropped before the second and third convolution, and so before their normalisation.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
        if layers:
            layers.append(nn.Dropout(drop))
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]
        if outputs > inputs > 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def build_dense(norm: Norm, *, width: int = 64) -> nn.Sequential:
    """Return a network of three dense layers, each followed by normalisation and ReLU: one value per image and channel.

    Args:
        norm: Makes the normalisation layers.
        width: Channels of each layer.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, width, width):
        layers += [nn.Linear(inputs, width, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cut(data: Batch, size: int) -> list[Batch]:
    """Return the data in batches, in their order; what does not fill one is left out."""
    images, labels = data
    return [(images[at : at + size], labels[at : at + size]) for at in range(0, len(labels) - size + 1, size)]


def shuffled(data: Batch, generator: torch.Generator) -> Batch:
    """Return the data in another order."""
    order = torch.randperm(len(data[1]), generator=generator)
    return data[0][order], data[1][order]


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
        steps: What each step is taken on: the gradients of its batches are averaged, each has its own forward pass.
        learning_rate: At the start.
        before: Called before each step with its number; a snapshot may be taken there.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step, batches in enumerate(steps):
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        optimizer.zero_grad()
        for images, labels in batches:
            loss = cross_entropy(model(images), labels) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def accuracy(model: nn.Module, data: Batch) -> float:
    """Return the share of right answers in eval mode; the model is left as it was."""
    return metrics.accuracy(copy.deepcopy(model).eval(), [data])


def by_batch(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of right answers where every batch is normalised as in training; the model is left as it was.

    Batch normalisation layers are in train mode, so that they take the statistics as they do there, and nothing else.
    """
    other = copy.deepcopy(model).eval()
    for layer in other.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of them all
            layer.train()
    return metrics.accuracy(other, list(batches))
