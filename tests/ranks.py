"""Writes what the ranks of a distributed run save, in one process.

The process group is torch's fake one: it exchanges nothing, and every rank is played in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

State = dict[str, Any]


@contextmanager
def rank_of(rank: int, *shape: int) -> Iterator[DeviceMesh]:
    """Play one rank, and yield the mesh of all of them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    count = int(torch.tensor(shape).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def distributed(tensor: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """Return the tensor as this rank holds it, cut by torch itself."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def sharded(state: State, mesh: DeviceMesh) -> State:
    """Return a state dict in which every tensor with dimensions is cut along the first one."""
    return {
        name: distributed(value, mesh, *([Shard(0) if value.ndim else Replicate()] * mesh.ndim))
        for name, value in state.items()
    }


def save_ranks(state: State, folder: Path, name: str = "rank{}.pt", world: int = 2) -> list[Path]:
    """Write a state dict that each rank saves with torch.save."""
    paths = []
    for rank in range(world):
        with rank_of(rank, world) as mesh:
            paths.append(folder / name.format(rank))
            torch.save(sharded(state, mesh), paths[-1])
    return paths


def save_distributed(folder: Path, build: Callable[[DeviceMesh], State], world: int = 2) -> Path:
    """Write the distributed checkpoint of several ranks, with the planner and the writer of torch."""
    plans, planners, writers = [], [], []
    for rank in range(world):
        with rank_of(rank, world) as mesh:
            planner, writer = DefaultSavePlanner(), FileSystemWriter(folder)
            planner.set_up_planner(build(mesh), StorageMeta(), is_coordinator=rank == 0)
            writer.set_up_storage_writer(is_coordinator=rank == 0)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
            planners.append(planner)
            writers.append(writer)
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for plan, planner, writer in zip(plans, planners, writers, strict=True)
    ]
    writers[0].finish(metadata, results)
    return folder
