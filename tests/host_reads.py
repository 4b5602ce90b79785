"""Counts how often a pass reads values of tensors on the host, each of which makes a GPU wait for all its work.

A test on the CPU takes every tensor for one of a device: `as_on_a_device`. What then reads a value is counted at both
ends, in the methods of tensors and in the operators below them. `numpy` does not count: it works on CPU tensors alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_METHODS = {
    "cpu", "tolist", "item", "__bool__", "__float__", "__int__", "__index__", "__contains__",
    "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "unique", "masked_select", "__repr__", "__format__",
}  # fmt: skip
_OPERATORS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "item",
}  # fmt: skip


class _Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self._reads, self._inside = reads, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        counts = name in _METHODS or (name == "__getitem__" and _has_mask(args[1]))
        if counts and not self._inside:
            self._reads[name, _place()] += 1
        self._inside += counts
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._inside -= counts


class _Operators(TorchDispatchMode):
    def __init__(self, reads, methods):
        super().__init__()
        self._reads, self._methods = reads, methods

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if not self._methods._inside and (name in _OPERATORS or is_masked):
            self._reads[name, _place()] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _place():
    """Return the innermost line of bnlab that is running."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/src/bnlab/" in path:
            return f"{path.rpartition('/src/bnlab/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def host_reads():
    """Yield a counter of the reads inside the block, by the name of the method or operator and the line of bnlab."""
    reads = Counter()
    methods = _Methods(reads)
    with methods, _Operators(reads, methods):
        yield reads


def as_on_a_device(monkeypatch):
    """Treat every tensor as one of a device. The transfers of `bnlab.observe.transfers` then copy CPU tensors."""
    monkeypatch.setattr("bnlab.observe.transfers._HOST", "no device")
    monkeypatch.setattr("bnlab.nn.running_update.is_readable", lambda values: False)
