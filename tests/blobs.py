"""A small classifier of two blobs, trained in train mode or in eval mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batches = list[tuple[Tensor, Tensor]]


def blobs(count: int, seed: int, *, shift: float = 0.0) -> Batches:
    """Return labelled points of two classes, far from 0, in batches of 32."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    points = shift + 4 + torch.randn(count, 8, generator=generator) + 3 * labels[:, None]
    return list(zip(points.split(32), labels.split(32), strict=True))


TRAINING, HELD_OUT = blobs(640, 0), blobs(320, 1)


def network() -> nn.Sequential:
    """Return a new network with the BN layers "1" and "4"."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 2),
    )  # fmt: skip


def trained(*, in_eval_mode: bool = False) -> nn.Sequential:
    """Return a network trained on `TRAINING`, in eval mode. With `in_eval_mode` its statistics are the initial ones."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for points, labels in TRAINING:
            model.train(not in_eval_mode)
            optimizer.zero_grad()
            cross_entropy(model(points), labels).backward()
            optimizer.step()
    return model.eval()


def corrupted(model: nn.Module, layer: str = "4", *, mean: float = 30.0, var: float = 20.0) -> nn.Module:
    """Return a copy, one layer of which has the statistics of something else."""
    twin = copy.deepcopy(model)
    twin.get_submodule(layer).running_mean.add_(mean)
    twin.get_submodule(layer).running_var.mul_(var)
    return twin


def sorted_by_label(batches: Batches) -> Batches:
    """Return the same points in batches of 32, ordered by label."""
    points, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    places = labels.argsort(stable=True)
    return list(zip(points[places].split(32), labels[places].split(32), strict=True))
