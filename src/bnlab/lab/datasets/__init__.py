"""Standard image data sets from local files, as batches. Nothing is downloaded or unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bnlab.errors import UnreadableFile, UsageError
from bnlab.lab.datasets import cifar10, digits, mnist
from bnlab.lab.datasets.images import Images
from bnlab.wording import did_you_mean

__all__ = ["NAMES", "SPLITS", "chosen", "first_present", "is_data_set", "load", "read", "split_names"]

_READERS: dict[str, Callable[[str, Path | None], Images]] = {
    "digits": lambda split, _: digits.read(split),
    "mnist": mnist.read,
    "cifar10": cifar10.read,
}

NAMES = tuple(_READERS)
"""The names of all data sets."""

SPLITS = ("train", "test")
"""The splits of every data set."""


def is_data_set(spec: str) -> bool:
    """Whether `spec` is `name`, `name:train` or `name:test` of a data set in `NAMES`."""
    name, colon, split = spec.partition(":")
    return name in NAMES and (split in SPLITS if colon else True)


def split_names() -> list[str]:
    """Return every name of a data set with every split, such as "mnist:train"."""
    return [f"{name}:{split}" for name in NAMES for split in SPLITS]


def read(spec: str, *, folder: Path | None = None) -> Images:
    """Read a data set in the order of its files.

    Args:
        spec: `digits`, `mnist` or `cifar10`, the test split, or one of these names with `:train` or `:test`.
        folder: The folder to search, instead of `$BNLAB_DATA`.

    Raises:
        UsageError: If there is no such data set or split.
        UnreadableFile: If its files are missing. The message lists the folders that were searched.
        DamagedFile: If a file breaks its format.
        MissingPackage: If the data set needs a package that is not installed.
    """
    if not is_data_set(spec):
        hint = did_you_mean(str(spec), [*NAMES, *split_names()])
        raise UsageError(
            f"datasets: spec must be {', '.join(NAMES)}, alone or with :train or :test, got {spec!r}.{hint}"
        )
    name, _, split = spec.partition(":")
    return _READERS[name](split or "test", folder)


def load(spec: str, *, batch_size: int = 128, folder: Path | None = None) -> list[tuple[Tensor, Tensor]]:
    """Read a data set, shuffled with seed 0. Every call returns the same batches in the same order.

    Args:
        spec: `digits`, `mnist` or `cifar10`, the test split, or one of these names with `:train` or `:test`.
        batch_size: Images per batch, at least 1; the last batch may have fewer.
        folder: The folder to search, instead of `$BNLAB_DATA`.

    Returns:
        Batches (images, labels). Images are float32 in [0, 1], without other normalisation, of shape (N, 1, 8, 8) for
        digits, (N, 1, 28, 28) for mnist and (N, 3, 32, 32), RGB, for cifar10. Labels are int64 in 0..9 of shape (N,).

    Raises:
        UsageError: If there is no such data set or split, or the batch size is below 1.
        UnreadableFile, DamagedFile, MissingPackage: As for `read`.

    Example:
        >>> from bnlab.lab import datasets
        >>> batches = datasets.load("digits")
        >>> len(batches), batches[0][0].shape, batches[0][1].shape
        (4, torch.Size([128, 1, 8, 8]), torch.Size([128]))
    """
    if batch_size < 1:
        raise UsageError(f"datasets: batch_size must be at least 1, got {batch_size}.")
    return read(spec, folder=folder).batches(batch_size)


def first_present(*names: str, folder: Path | None = None) -> str:
    """Return the first of these data sets whose files are present, or the last one if none is.

    Args:
        names: The names of data sets, in the order of preference.
        folder: The folder to search, instead of `$BNLAB_DATA`.

    Raises:
        DamagedFile: If a file breaks its format.
        MissingPackage: If a data set needs a package that is not installed.

    Example:
        >>> from bnlab.lab import datasets
        >>> datasets.first_present("digits", "mnist")
        'digits'
    """
    for name in names[:-1]:
        try:
            read(f"{name}:train", folder=folder)
        except UnreadableFile:
            continue
        return name
    return names[-1]


def chosen(name: str, *allowed: str, folder: Path | None = None) -> str:
    """Return the name of a data set. For "auto", return the first allowed one whose files are present.

    Raises:
        UsageError: If the name is not allowed.
    """
    if name == "auto":
        return first_present(*allowed, folder=folder)
    if name not in allowed:
        raise UsageError(f"data: data must be auto, {' or '.join(allowed)}, got {name!r}.")
    return name
