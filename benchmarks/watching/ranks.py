"""Training loops of two ranks in two processes, with gloo."""

from __future__ import annotations

import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined] # torch exports it by a star
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from benchmarks.watching.loop import Outcome, batch, optimizer_of, watched
from benchmarks.watching.networks import FIRST_LAYER, Build

__all__ = ["diverging_ranks", "equal_ranks"]

_STEPS = 60
_EVERY = 5


def diverging_ranks(build: Build) -> Outcome:
    """Train with DDP on data that differs between the ranks, while each keeps its own running statistics."""
    outcome = _run(build, shift=1.0)
    first = next((event for event in outcome.events if event.code == "BN604"), None)
    # Nothing but the noise decides at which comparison the difference is large enough: an early one is right.
    outcome.step = first.step if first is not None and first.step <= _STEPS // 2 else -1
    outcome.layer = FIRST_LAYER
    return outcome


def equal_ranks(build: Build) -> Outcome:
    """Train with DDP on shuffled data, while each rank keeps its own running statistics."""
    return _run(build, shift=0.0)


def _run(build: Build, shift: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        seed = torch.initial_seed()
        spawn(  # type: ignore[no-untyped-call]
            _rank, args=(build, shift, seed, path), nprocs=2
        )
        outcome: Outcome = torch.load(path / "outcome.pt", weights_only=False)
        return outcome


def _rank(rank: int, build: Build, shift: float, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    store = FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        torch.manual_seed(seed)
        model = nn.parallel.DistributedDataParallel(build(), broadcast_buffers=False)
        optimizer, outcome = optimizer_of(model, 0.005), Outcome()
        torch.manual_seed(seed + 1000 * (rank + 1))
        with watched(model, optimizer, outcome, every=_EVERY):
            for _ in range(_STEPS):
                x, labels = batch()
                optimizer.zero_grad()
                F.cross_entropy(model(x + shift * rank), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            dist.barrier()
        if rank == 0:
            torch.save(outcome, folder / "outcome.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
