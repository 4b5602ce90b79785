"""Networks to export, and their programs."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

__all__ = ["Mixed", "Net", "batches", "program_of", "trained"]

SAMPLES = 8


class Net(nn.Module):
    """Two BN layers, of which one is in a container; input (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.3)
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.block(self.conv2(F.relu(self.bn1(self.conv(x))))).mean((2, 3)))


class Mixed(nn.Module):
    """A shared BN layer, dropout, a sigmoid, BN without parameters and BN without statistics; input (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = torch.sigmoid(self.bn(self.conv(x)))
        return self.free(self.bn(self.plain(self.drop(x)))).mean((2, 3))


def batches(count=6, samples=SAMPLES, device="cpu"):
    """Return batches of images, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [(1 + 2 * torch.randn(samples, 3, 8, 8, generator=generator)).to(device) for _ in range(count)]


def trained(device="cpu"):
    """Return a Net whose statistics are those of a few batches."""
    torch.manual_seed(0)
    model = Net().to(device)
    for x in batches(device=device):
        model(x)
    return model


def program_of(model, *, dynamic=False):
    """Return the exported program of a model for the images of `batches`."""
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    device = next(model.parameters()).device
    return torch.export.export(model, (batches(1, device=device)[0],), dynamic_shapes=shapes)
