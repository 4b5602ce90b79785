"""What the tests of the integrations have in common."""

from __future__ import annotations

import copy

import torch
from torch import nn


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))


def batches(count=4, size=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) * 2 + 3 for _ in range(count)]


def first_statistics(model, data):
    """Return the mean and unbiased variance of the inputs of the first BN layer, from float64: shape (8,)."""
    values = torch.cat([copy.deepcopy(model[0]).double()(batch.double()) for batch in data]).detach()
    return values.mean(0).float(), values.var(0).float()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
