"""Reads the loader that a framework trains with, without a trace in the training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from bnlab.uninterrupted import restores

__all__ = ["apart", "generators_kept"]

_DEPTH = 4
"""How deep samplers lie in each other."""


def apart(loader: Any) -> Any:  # noqa: ANN401 - data of any form
    """Return a loader that can be read while a training loop reads the one it comes from.

    With `persistent_workers`, a DataLoader has one iterator, which a second pass would restart. One that accelerate has
    prepared counts the passes over it: the DataLoader inside is used.

    Args:
        loader: Data in any form; other forms than a DataLoader are returned as they are.
    """
    inner = vars(loader).get("base_dataloader", loader) if hasattr(loader, "__dict__") else loader
    if not isinstance(inner, DataLoader):
        return inner
    second = copy.copy(inner)
    vars(second).update(persistent_workers=False, _iterator=None)
    return second


@restores
def generators_kept(loader: Any) -> Iterator[None]:  # noqa: ANN401 - data of any form
    """Restore the generators of a loader and its samplers when the block ends."""
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    """Return the generators of a loader, its samplers and its data, each once."""
    generators: dict[int, torch.Generator] = {}
    nodes = [loader]
    for _ in range(_DEPTH):
        for node in nodes:
            generator = getattr(node, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[id(generator)] = generator
        nodes = [
            inner
            for node in nodes
            for name in ("base_dataloader", "batch_sampler", "sampler", "dataset")
            if (inner := getattr(node, name, None)) is not None
        ]
    return [*generators.values()]
