"""A project without bnlab: data, a network and a training loop in plain PyTorch. The examples start from it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


def load_batches(batch_size: int = 64) -> tuple[list[Batch], list[Batch]]:
    """Return the batches of the training images and of the held-out images: 8x8 digits in ten classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batches = list(zip(images[order].split(batch_size), labels[order].split(batch_size), strict=True))
    return batches[7:-1], batches[:7]


def build_network(momentum: float = 0.1) -> nn.Sequential:
    """Return a CNN with three BN layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs) in enumerate([(1, 16), (16, 32), (32, 32)], start=1):
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(outputs, momentum=momentum)
        layers[f"relu{index}"] = nn.ReLU()
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classify"] = nn.Linear(32, 10)
    return nn.Sequential(layers)


def train(model: nn.Module, batches: list[Batch], epochs: int = 6) -> None:
    """Train with Adam, and leave the model in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Return the share of images that the model classifies correctly."""
    model.eval()
    with torch.no_grad():
        correct = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(correct).mean())
