"""Counters for programs that wait for each other: zero before and after every launch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counters"]

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


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
    zeros = _COUNTERS.get(key)
    if zeros is None or zeros.numel() < number:
        zeros = _COUNTERS[key] = torch.zeros(max(number, 4096), dtype=torch.int32, device=device)
    return zeros
