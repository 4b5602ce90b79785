"""Labelled images, stored and as batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnlab.errors import DamagedFile

__all__ = ["CLASSES", "Images", "checked_labels"]

CLASSES = 10


@dataclass(frozen=True)
class Images:
    """One split of a data set.

    Attributes:
        pixels: uint8 of shape (N, channels, height, width).
        labels: int64 of shape (N,), 0..9.
        white: The pixel value that becomes 1.
    """

    pixels: Tensor
    labels: Tensor
    white: int

    def batch(self, indices: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return images, float32 in [0, 1], and their labels. The default is all images in their order."""
        return self.pixels[indices].to(torch.float32) / self.white, self.labels[indices]

    def batches(self, size: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Return shuffled batches (images, labels), the images float32 in [0, 1]."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return [self.batch(order[at : at + size]) for at in range(0, len(order), size)]


def checked_labels(path: Path, labels: NDArray[Any], images: int) -> Tensor:
    """Return the labels as int64.

    Raises:
        DamagedFile: If the number of labels differs from the number of images, or if a label is not a class.
    """
    if labels.shape != (images,) or not images:
        raise DamagedFile(f"{path}: file must hold a label for each of {images} images, got {labels.size}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= CLASSES:
        raise DamagedFile(f"{path}: labels must be integers from 0 to {CLASSES - 1}, got something else.")
    return torch.from_numpy(labels.astype(np.int64))
