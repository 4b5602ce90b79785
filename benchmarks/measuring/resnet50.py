"""A network built like ResNet-50, and the activations of its BN layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from benchmarks.measuring.timing import Step

__all__ = [
    "BLOCKS",
    "BN_ACTIVATIONS",
    "SIDES",
    "Bottleneck",
    "classifier",
    "decoder",
    "network_for",
    "resnet50",
    "training_step",
]

BN_ACTIVATIONS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
"""The channels and the side of activations that BN layers of ResNet-50 normalise, for images of 224 by 224."""

BLOCKS = (3, 4, 6, 3)
"""The number of bottlenecks in each stage of ResNet-50."""

SIDES = ("torch", "bnlab", "bnlab, fused")
"""The layers of a network: torch's, bnlab's, and bnlab's with the ReLU and the residual that follow."""


class Bottleneck(nn.Module):
    """The bottleneck of ResNet-50, with the stride in the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block for an input (N, C, H, W)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.downsample(x)
        return F.relu(out, inplace=True)


def resnet50(head: nn.Module, blocks: Sequence[int] = BLOCKS) -> nn.Sequential:
    """Return a network built like ResNet-50: 53 BN layers with the usual numbers of bottlenecks."""
    stages: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for index, count in enumerate(blocks):
        width = 64 << index
        for block in range(count):
            stages.append(Bottleneck(inputs, width, 2 if index and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*stages, head)


def classifier(stages: int = len(BLOCKS)) -> nn.Module:
    """Return the head of ResNet-50, behind so many stages."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128 << stages, 1000))


def decoder() -> nn.Module:
    """Return a head without BN that costs about as much as the network, so that the last BN layer runs early."""
    return nn.Sequential(
        nn.Conv2d(2048, 512, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=8), nn.Conv2d(512, 256, 3, padding=1)
    )


def network_for(x: Tensor, side: str, blocks: Sequence[int] = BLOCKS) -> nn.Module:
    """Return the network with the layers of a side, in train mode, on the device and in the layout of its input."""
    torch.manual_seed(0)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    model: nn.Module = resnet50(classifier(len(blocks)), blocks).train()
    model = model.to(x.device).to(memory_format=layout)  # type: ignore[call-overload]
    if side != SIDES[0]:
        is_fused = side == SIDES[2]
        bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=is_fused, example=x[:2] if is_fused else None)
    return model


def training_step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Step:
    """Return a training step: forward (in another dtype, if one is passed), loss, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
