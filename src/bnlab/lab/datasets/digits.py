"""The handwritten digits of scikit-learn: 1797 images of 8x8 pixels, 0..16."""

from __future__ import annotations

import torch

from bnlab.errors import MissingPackage
from bnlab.lab.datasets.images import Images

__all__ = ["read", "read_all"]


def read(split: str) -> Images:
    """Return the first quarter of the shuffled images (seed 0) as "test", or the others as "train".

    This is the split of `bnlab.lab.stuck_statistics` at its default seed.

    Raises:
        MissingPackage: If scikit-learn is not installed.
    """
    whole = read_all()
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))
    quarter = len(order) // 4
    part = order[:quarter] if split == "test" else order[quarter:]
    return Images(whole.pixels[part], whole.labels[part], whole.white)


def read_all() -> Images:
    """Return all images, of shape (1797, 1, 8, 8), in the order of scikit-learn.

    Raises:
        MissingPackage: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackage(
            "digits: data must be readable without scikit-learn, got none. Install it: pip install 'bnlab[lab]'."
        ) from None
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return Images(pixels, torch.from_numpy(digits.target).to(torch.int64), white=16)
