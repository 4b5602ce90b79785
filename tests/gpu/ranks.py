"""What each process of a distributed test runs. It writes what it sees to a folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnlab

BATCH = (4, 3, 9, 9)


def network() -> nn.Sequential:
    """Return the same network in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        bnlab.nn.BatchNorm2d(8, activation="relu"),
        nn.Conv2d(8, 4, 3, bias=False),
        bnlab.nn.BatchNorm2d(4),
    )


def batch_of_rank(rank: int) -> torch.Tensor:
    """Return the batch of a process, with a mean and spread of its own."""
    return rank + (1 + rank) * torch.randn(BATCH, generator=torch.Generator().manual_seed(rank))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """Return a loss that does not hang on the sign of anything small."""
    return (y * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)).sum()


def train(rank: int, world: int, backend: str, device_type: str, folder: str) -> None:
    """Take a step of training, then a forward pass in which the last process gets a NaN."""
    count = torch.cuda.device_count() if device_type == "cuda" else 1
    device = torch.device(device_type, rank % count) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = (Path(folder) / f"store of {backend}").as_uri()
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    try:
        net = network().to(device)
        wrapped = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
        x = batch_of_rank(rank).to(device)
        loss_of(wrapped(x)).backward()
        seen = {
            "gradients": {name: parameter.grad.cpu() for name, parameter in net.named_parameters()},
            "state": copy.deepcopy(net).cpu().state_dict(),
        }
        if rank == world - 1:
            x = x * float("nan")
        with torch.no_grad():
            wrapped(x)
        seen["skipped"] = int(net[1].skipped_batches)
        seen["batches"] = int(net[1].num_batches_tracked)
        seen["finite"] = all(bool(value.isfinite().all()) for value in net.state_dict().values())
        seen["backend"] = repr(net[1])
        torch.save(seen, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
