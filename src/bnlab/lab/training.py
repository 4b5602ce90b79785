"""What the experiments that train share: data as tensors, seeded minibatches, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.lab import datasets

__all__ = ["Labelled", "accuracy", "chosen_data", "eval_mode", "minibatches", "read"]

_ALL = 1 << 30


@dataclass(frozen=True)
class Labelled:
    """Images and their labels.

    Attributes:
        images: float32 in [0, 1].
        labels: int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def parted(self, count: int) -> tuple[Labelled, Labelled]:
        """Return the first `count` images, and the others."""
        return (
            Labelled(self.images[:count], self.labels[:count]),
            Labelled(self.images[count:], self.labels[count:]),
        )


def chosen_data(asked: str, *names: str) -> str:
    """Return the data set that is asked for; for "auto" the first of `names` whose files are found.

    Raises:
        UsageError: If it is none of `names`.
    """
    if asked == "auto":
        return datasets.first_present(*names)
    if asked not in names:
        raise UsageError(f"data: data must be auto, {' or '.join(names)}, got {asked!r}.")
    return asked


def read(spec: str, most: int = _ALL) -> Labelled:
    """Read the first `most` images of a split, as `name:split`, shuffled with seed 0."""
    images, labels = datasets.load(spec, batch_size=most)[0]
    return Labelled(images, labels)


def minibatches(data: Labelled, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: the data in a new order each time, what does not fill a batch left out."""
    size = min(size, len(data))
    while True:
        order = torch.randperm(len(data), generator=generator)
        for at in range(0, len(order) - size + 1, size):
            part = order[at : at + size]
            yield data.images[part], data.labels[part]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network that is being trained in eval mode, without gradients, for as long as the block runs."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def accuracy(model: nn.Module, data: Labelled) -> float:
    """Return the share of images whose largest output is that of their label, in eval mode.

    An output that is not finite counts as a miss.
    """
    with eval_mode(model):
        scores = torch.cat([model(part) for part in torch.split(data.images, 1000)])
    hit = (scores.argmax(1) == data.labels) & scores.isfinite().all(1)
    return float(hit.double().mean())
