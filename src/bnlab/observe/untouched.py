"""Running a model without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.errors import BnlabError, UsageError

__all__ = ["said", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers, attributes and every random number generator back when the block ends, however it ends.

    Buffers get their values back, and are the same tensors as before; what is random behind the block goes on as if it
    had not been there. Attributes are put back by reference: a list that forward appended to keeps what it got. So are
    parameters: one that forward gives other values gets its own back, unless it was changed in place.
    """
    attributes = [(module, _attributes(module)) for module in model.modules()]
    buffers: list[tuple[nn.Module, str, Tensor | None]] = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001 - entries that are None count too
    ]
    values = {id(buffer): (buffer, buffer.detach().clone()) for buffer in model.buffers()}
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    devices = sorted({buffer.device.index or 0 for buffer, _ in values.values() if buffer.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what models draw from
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for module, before in attributes:
                for name in _attributes(module).keys() - before.keys():
                    del vars(module)[name]
                vars(module).update(before)
            for parameter, value in parameters:
                parameter.data = value
            for module, name, buffer in buffers:
                module._buffers[name] = buffer  # noqa: SLF001
            with torch.no_grad():
                for buffer, value in values.values():
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _attributes(module: nn.Module) -> dict[str, object]:
    containers = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in containers}


@contextmanager
def said(rule: str) -> Iterator[None]:
    """Turn whatever a model raises into one line."""
    try:
        yield
    except BnlabError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"model: {rule}, got {type(error).__name__}: {text[:300]}") from error
