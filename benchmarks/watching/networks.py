"""Two small networks whose BN layers have the type that a loop wants."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["FIRST_LAYER", "NETWORKS", "Build", "Network", "mobile", "residual"]

CLASSES = 4
"""Number of classes of the images."""

FIRST_LAYER = "stem.1"
"""The layer that runs first, in every network."""


class _Residual(nn.Module):
    def __init__(self, width: int, layer: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = layer(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        z: Tensor = self.relu(self.bn2(self.conv2(y)) + x)
        return z


class _Mobile(nn.Module):
    def __init__(self, width: int, layer: type[nn.Module]) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = layer(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.bn2 = layer(width)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.bn1(self.depthwise(x)))
        z: Tensor = self.bn2(self.pointwise(y))
        return x + z


class _Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inside = inside
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inside, x, use_reentrant=self.use_reentrant)
        return y


class Network(nn.Module):
    """A stem, a block and a head, for images of 8 by 8.

    Args:
        block: The class of the block.
        layer: The class of the BN layers.
        outputs: Number of outputs.
    """

    def __init__(
        self, block: Callable[[int, type[nn.Module]], nn.Module], layer: type[nn.Module], outputs: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), layer(8), nn.ReLU())
        self.body = block(8, layer)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for images (N, 3, 8, 8)."""
        y: Tensor = self.head(self.body(self.stem(x)))
        return y

    def checkpoint_body(self, *, use_reentrant: bool) -> None:
        """Recompute the block in the backward pass."""
        self.body = _Checkpointed(self.body, use_reentrant)

    def normalise_head(self) -> None:
        """Put a BN layer into the head, which has one value per sample and channel."""
        self.head[2] = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))


Build = Callable[..., Network]
"""A function that takes `layer` and `outputs` and returns a network."""


def residual(layer: type[nn.Module] = nn.BatchNorm2d, outputs: int = CLASSES) -> Network:
    """Return a ResNet of one block."""
    return Network(_Residual, layer, outputs)


def mobile(layer: type[nn.Module] = nn.BatchNorm2d, outputs: int = CLASSES) -> Network:
    """Return a MobileNet of one block."""
    return Network(_Mobile, layer, outputs)


NETWORKS: dict[str, Build] = {"residual": residual, "mobile": mobile}
