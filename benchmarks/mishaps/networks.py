"""Small architectures for 8x8 digits, and their training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.lab import datasets, small_networks

__all__ = [
    "ARCHITECTURES",
    "HELD_OUT",
    "MEAN",
    "STD",
    "Batches",
    "Trained",
    "batched",
    "bns",
    "build",
    "cross_entropy",
    "cut",
    "fit",
    "forward_only",
    "images_of",
    "norm_paths",
    "normalised",
    "trained",
]

Batches = list[tuple[Tensor, Tensor]]

MEAN, STD = 0.3053, 0.3760
"""The mean and standard deviation of the pixels of the digits in [0, 1]."""

HELD_OUT = ("densenet", "inception")
"""The architectures that are not used for calibration. They appear in the published figures only."""


def cnn(**first: nn.Module) -> nn.Sequential:
    """Return three convolutions with BN, after the modules of `first`."""
    return nn.Sequential(OrderedDict([*first.items(), *small_networks.cnn().named_children()]))


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, drop: float = 0.0) -> nn.Sequential:
    """Return two hidden layers with BN1d."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate([(64, 64), (64, 32)], start=1):
        if drop and index == 2:
            layers["drop"] = nn.Dropout(drop)
        layers[f"fc{index}"] = nn.Linear(inputs, outputs, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm1d(outputs)
        layers[f"act{index}"] = activation()
    layers["classify"] = nn.Linear(32, 10)
    return nn.Sequential(layers)


class Block(nn.Module):
    """The basic block of ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        total: Tensor = F.relu(out + self.shortcut(x))
        return total


def resnet() -> nn.Sequential:
    """Return a stem and three basic blocks."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 1, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        Block(12, 12),
        Block(12, 24, 2),
        Block(24, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class PreBlock(nn.Module):
    """A pre-activation block: BN and ReLU come before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        x = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.shortcut(x)
        return out


def preact() -> nn.Sequential:
    """Return a pre-activation network."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 1, 1, bias=False),
        PreBlock(12, 16),
        PreBlock(16, 24, 2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def mobilenet() -> nn.Sequential:
    """Return depthwise-separable convolutions."""

    def unit(inputs: int, outputs: int, kernel: int, groups: int = 1, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]

    return nn.Sequential(
        *unit(1, 16, 3),
        *unit(16, 16, 3, groups=16),
        *unit(16, 32, 1),
        *unit(32, 32, 3, groups=32, stride=2),
        *unit(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Dense(nn.Module):
    """A small DenseNet: every layer gets the outputs of all layers before it."""

    def __init__(self, growth: int = 12) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, growth, 3, 1, 1, bias=False)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (index + 1)),
                nn.ReLU(),
                nn.Conv2d(growth * (index + 1), 2 * growth, 1, bias=False),
                nn.BatchNorm2d(2 * growth),
                nn.ReLU(),
                nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
            )
            for index in range(3)
        )
        self.norm = nn.BatchNorm2d(4 * growth)
        self.classify = nn.Linear(4 * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from concatenated features."""
        x = F.avg_pool2d(self.conv0(x), 2)
        for layer in self.convs:
            x = torch.cat([x, layer(x)], 1)
        out: Tensor = self.classify(F.relu(self.norm(x)).mean((2, 3)))
        return out


class Mixed(nn.Module):
    """An inception block: branches of several kernel sizes and of pooling, each with its BN, side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.point = _unit(inputs, width, 1)
        self.wide = nn.Sequential(_unit(inputs, width, 1), _unit(width, width, 3))
        self.wider = nn.Sequential(_unit(inputs, width, 1), _unit(width, width, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _unit(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches, concatenated."""
        return torch.cat([self.point(x), self.wide(x), self.wider(x), self.pooled(x)], 1)


def _unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def inception() -> nn.Sequential:
    """Return two inception blocks."""
    return nn.Sequential(
        _unit(1, 16, 3),
        Mixed(16, 8),
        nn.MaxPool2d(2),
        Mixed(32, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Volume(nn.Module):
    """A 3d network that reads an image as a cube of 4x4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm3d(12),
            nn.SiLU(),
            nn.Conv3d(12, 24, 3, padding=1, bias=False),
            nn.BatchNorm3d(24),
            nn.ReLU(),
        )
        self.classify = nn.Linear(24 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of an image, reshaped to a cube."""
        out: Tensor = self.classify(self.body(x.reshape(-1, 1, 4, 4, 4)).flatten(1))
        return out


class Sequence(nn.Module):
    """A 1d network that reads an image as 8 channels over time, of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(8, 32, 3, padding=1, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.classify = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from the largest values over time."""
        out: Tensor = self.classify(self.body(x.flatten(1, 2)).amax(2))
        return out


class Gated(nn.Module):
    """A network with squeeze and excitation: a sigmoid gates the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.gate = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 24), nn.Sigmoid())
        self.conv2 = nn.Conv2d(24, 24, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.classify = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, with the gate between the convolutions."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = x * self.gate(x.mean((2, 3)))[:, :, None, None]
        out: Tensor = self.classify(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
        return out


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "cnn": cnn,
    "mlp": mlp,
    "resnet": resnet,
    "preact": preact,
    "mobilenet": mobilenet,
    "densenet": Dense,
    "inception": inception,
    "cnn3d": Volume,
    "sequence": Sequence,
    "gated": Gated,
    "tanh": lambda: mlp(nn.Tanh),
}


@dataclass(frozen=True)
class Trained:
    """A trained network with its training batches and its evaluation batches."""

    model: nn.Module
    train: Batches
    test: Batches


def bns(model: nn.Module) -> list[_BatchNorm]:
    """Return the BN layers in order of registration."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def norm_paths(model: nn.Module) -> list[str]:
    """Return the paths of the BN layers in order of registration."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


@cache
def images_of(split: str) -> tuple[Tensor, Tensor]:
    """Return all images of a split, normalised, and their labels."""
    images, labels = datasets.read(f"digits:{split}").batch()
    return normalised(images), labels


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1], normalised for the networks."""
    return (pixels - MEAN) / STD


def cut(images: Tensor, labels: Tensor, size: int, *, ragged: bool = False) -> Batches:
    """Return batches in the order of the samples. An incomplete last batch is dropped unless `ragged` is set."""
    return small_networks.cut((images, labels), size, ragged=ragged)


def batched(split: str, seed: int, size: int = 64, *, ragged: bool = False) -> Batches:
    """Return the shuffled batches of a split."""
    images, labels = images_of(split)
    generator = torch.Generator().manual_seed(1000 + seed)
    return small_networks.cut(small_networks.shuffled((images, labels), generator), size, ragged=ragged)


def build(make: Callable[[], nn.Module], seed: int, *, momentum: float | None = 0.1, eps: float = 1e-5) -> nn.Module:
    """Return an untrained network."""
    with small_networks.seeded(seed):
        model = make()
    for layer in bns(model):
        layer.momentum, layer.eps = momentum, eps
    return model


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(
    model: nn.Module,
    seed: int,
    *,
    epochs: int = 8,
    size: int = 64,
    rate: float = 5e-3,
    decaying: bool = True,
    batches: Batches | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    train_mode: bool = True,
    frozen: Iterable[nn.Module] = (),
) -> nn.Module:
    """Train on the digits.

    Args:
        model: The model, which is trained in place.
        seed: The seed of the order of the samples.
        epochs: The passes over the data.
        size: The samples in a batch.
        rate: The learning rate of Adam, the default optimizer.
        decaying: Whether the learning rate falls to 0 along a cosine.
        batches: Batches to use in this order in every epoch, instead of shuffled ones.
        prepare: A function that is applied to the images of every batch.
        optimizer: The optimizer, instead of Adam.
        accumulate: The number of batches per optimizer step.
        train_mode: Whether to train in train mode, or in eval mode.
        frozen: The layers that stay in eval mode.
    """
    images, labels = images_of("train")
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.Adam(parameters, lr=rate)
    per_epoch = len(batches) if batches else len(labels) // size
    steps = max(1, epochs * per_epoch // accumulate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decaying else None
    model.train(train_mode)
    for layer in frozen:
        layer.eval()
    done = 0
    with small_networks.seeded(seed):
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for batch in batches or cut(images[order], labels[order], size):
                cross_entropy(model, (prepare(batch[0]), batch[1])).backward()  # type: ignore[no-untyped-call]
                done += 1
                if done % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    if schedule is not None:
                        schedule.step()
    return model.train()


@torch.no_grad()
def forward_only(model: nn.Module, batches: Batches, *, momentum: float | None = None, reset: bool = True) -> None:
    """Run batches in train mode to update the running statistics, as a cumulative average if momentum is None."""
    before = [layer.momentum for layer in bns(model)]
    for layer in bns(model):
        layer.momentum = momentum
        if reset:
            layer.reset_running_stats()
    model.train()
    for images, _ in batches:
        model(images)
    for layer, value in zip(bns(model), before, strict=True):
        layer.momentum = value


@cache
def _trained(name: str, seed: int) -> Trained:
    model = fit(build(ARCHITECTURES[name], seed), seed)
    return Trained(model, batched("train", seed), batched("test", seed))


def trained(name: str, seed: int) -> Trained:
    """Return a trained network in train mode, which the caller may change."""
    cached = _trained(name, seed)
    return Trained(copy.deepcopy(cached.model), list(cached.train), list(cached.test))
