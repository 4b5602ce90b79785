"""Counters for programs that wait for each other: zero before and after every launch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["counters"]

_COUNTERS: dict[tuple[torch.device, int], list[Tensor]] = {}
"""The counters of every stream. The last ones are in use; a launch in the queue may still need those before."""


def counters(device: torch.device, number: int) -> Tensor:
    """Return at least `number` zeros, int32, that no launch on another stream uses.

    Launches on one stream follow each other, and each leaves zeros behind, so that they share one tensor. A CUDA graph
    may be replayed on any stream: it gets zeros of its own, which every replay sets again.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(number, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    known = _COUNTERS.setdefault(key, [])
    if not known or known[-1].numel() < number:
        known.append(_lasting_zeros(device, max(4096, 2 * number)))
    return known[-1]


def _lasting_zeros(device: torch.device, number: int) -> Tensor:
    """Return zeros from the memory that all share.

    Where torch.compile warms up a CUDA graph, this thread or its stream allocates from the memory of the graph, which
    must not keep a tensor: the graph would overwrite it. Another thread allocates elsewhere, on the default stream.
    """
    with ThreadPoolExecutor(1) as executor:
        zeros = executor.submit(lambda: torch.zeros(number, dtype=torch.int32, device=device)).result()
    torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    return zeros
