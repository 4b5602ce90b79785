"""Real networks of $BNLAB_DATA, healthy and broken."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.errors import BnlabError
from bnlab.lab import datasets

from .case import Absent, Setting, Subject, healthy, mishap
from .networks import Batches, bns, cut, norm_paths


def _path(name: str) -> Path:
    root = os.environ.get("BNLAB_DATA")
    path = Path(root or "", "nets", name)
    if not root or not path.is_file():
        raise Absent(f"nets/{name} is not in $BNLAB_DATA")
    return path


@cache
def _images(spec: str, count: int, size: int) -> Batches:
    try:
        batches = datasets.load(spec, batch_size=size)
    except BnlabError as error:
        raise Absent(str(error)) from None
    return batches[: count // size]


class BurnMnist(nn.Module):
    """The small CNN of the MNIST example of Burn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.conv3 = nn.Conv2d(16, 24, 3)
        self.norm1 = nn.BatchNorm2d(24)
        self.fc1 = nn.Linear(11616, 32)
        self.fc2 = nn.Linear(32, 10)
        self.norm2 = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the log probabilities."""
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        x = self.fc2(F.relu(self.fc1(self.norm1(x).flatten(1))))
        return F.log_softmax(self.norm2(x), 1)


def _mnist_net() -> nn.Module:
    model = BurnMnist()
    model.load_state_dict(load_file(_path("burn_mnist/mnist.safetensors")))
    return model


def _mnist(spec: str) -> Batches:
    return [((x - 0.1307) / 0.3081, y) for x, y in _images(spec, 1024, 64)]


@healthy
def mnist(setting: Setting) -> Subject:  # noqa: ARG001 - the network comes from a file
    """Burn's CNN runs on MNIST with the right preprocessing."""
    return Subject(_mnist_net(), _mnist("mnist:test"), _mnist("mnist:train"))


@mishap
def mnist_without_normalisation(setting: Setting) -> Subject:  # noqa: ARG001
    """Burn's CNN runs on MNIST with x/255 as the only preprocessing."""
    return Subject(_mnist_net(), _images("mnist:test", 1024, 64), _mnist("mnist:train"))


@mishap
def mnist_buffers_of_another_run(setting: Setting) -> Subject:  # noqa: ARG001
    """Burn's CNN has the statistics of its other file."""
    model = _mnist_net()
    other = torch.load(_path("burn_mnist/mnist.pt"), map_location="cpu", weights_only=True)
    state = {key: value for key, value in other.items() if "running" in key}
    model.load_state_dict(state, strict=False)
    return Subject(model, _mnist("mnist:test"), _mnist("mnist:train"))


class CifarBlock(nn.Module):
    """A basic block whose shortcut has no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to every second pixel, with channels of zeros."""
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        side = self.more // 2
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side)))


class CifarResNet(nn.Module):
    """ResNet-20."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            blocks = [CifarBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)]
            blocks += [CifarBlock(widths[stage], widths[stage], 1) for _ in range(2)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from three stages and a mean."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def _resnet20() -> nn.Module:
    file = torch.load(_path("akamaster_cifar10/resnet20-12fca82f.th"), map_location="cpu", weights_only=True)
    state = {key.removeprefix("module."): value for key, value in file["state_dict"].items()}
    model = CifarResNet()
    missing = model.load_state_dict(state, strict=False)
    if any("num_batches_tracked" not in key for key in (*missing.missing_keys, *missing.unexpected_keys)):
        raise Absent("nets/akamaster_cifar10 holds another network")
    return model


@cache
def _lossless() -> Batches:
    """Return 1024 shuffled training images of the network. The JPEG images would be a shift for it."""
    path = Path(os.environ.get("BNLAB_DATA") or "", "cifar10", "cifar10_lossless_train4000.npz")
    if not path.is_file():
        raise Absent("cifar10/cifar10_lossless_train4000.npz is not in $BNLAB_DATA")
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["image"]), torch.from_numpy(file["label"]).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1024]
    pixels = images[order].permute(0, 3, 1, 2).to(torch.float32) / 255
    return cut(_normalised(pixels), labels[order], 64)


def _normalised(pixels: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels - mean) / std


def _jpeg() -> Batches:
    return [(_normalised(x), y) for x, y in _images("cifar10:test", 512, 64)]


@healthy
def resnet20(setting: Setting) -> Subject:  # noqa: ARG001
    """ResNet-20 runs on CIFAR-10."""
    return Subject(_resnet20(), _lossless()[:8], _lossless()[8:])


@mishap
def resnet20_one_corrupted_layer(setting: Setting) -> Subject:
    """One layer of ResNet-20 has its statistics in a different order of channels."""
    model = _resnet20()
    index = 9
    layer, path = bns(model)[index], norm_paths(model)[index]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    order = torch.randperm(layer.num_features, generator=torch.Generator().manual_seed(setting.seed))
    layer.running_mean.copy_(layer.running_mean[order])
    layer.running_var.copy_(layer.running_var[order])
    return Subject(model, _lossless()[:8], _lossless()[8:], planted=(path,))


@mishap
def resnet20_sorted_loader(setting: Setting) -> Subject:  # noqa: ARG001
    """ResNet-20 runs on CIFAR-10 sorted by class."""
    batches = _jpeg()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = labels.argsort(stable=True)
    return Subject(_resnet20(), cut(images[order], labels[order], 64))
