"""Reads the numbers of an HDF5 file, such as the weights of Keras, through h5py and an open stream.

h5py gets the bytes of this one file and no path. Links that lead to other names or other files are not followed, and
data that lie in other files are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import MissingPackage
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.numpy_data import torch_dtype
from bnlab.observe.files.tensors import MAX_RANK, StoredTensor

if TYPE_CHECKING:
    from h5py import Dataset, Group

__all__ = ["HDF5_MAGIC", "Hdf5Contents", "read_hdf5"]

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_DEEPEST = 64
_LARGEST_CHUNK = 256 << 20
_BUILT_IN_FILTERS = frozenset({1, 2, 3, 4, 5, 6, 32000})  # those that HDF5 and h5py hold; others load a plugin
_CONFIG = "model_config"


@dataclass
class Hdf5Contents:
    """What an HDF5 file holds.

    Attributes:
        tensors: The arrays of numbers by their paths, which are not read yet.
        names: The attribute "name" of groups by their paths: Keras 3 writes that of the layer.
        collections: The paths of groups with the attribute "weight_names", in which older versions keep one layer.
        config: The attribute "model_config": the JSON text with which older versions describe the model; "" without.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    collections: set[str] = field(default_factory=set)
    config: str = ""


def read_hdf5(stream: BinaryIO, budget: Budget) -> Hdf5Contents:
    """Read an HDF5 file down to its arrays, which stay unread.

    Args:
        stream: The bytes of the file.
        budget: The work on the file so far.

    Raises:
        MissingPackage: If h5py is not installed.
        ValueError, OSError, RuntimeError: If the file is damaged, or if its data lie in other files.
        TooMuchWork: If it has more groups than any checkpoint.
    """
    try:
        import h5py
    except ImportError:
        raise MissingPackage(
            "file must be readable without the h5py package, got an HDF5 file. Install it: pip install 'bnlab[keras]'."
        ) from None
    contents = Hdf5Contents()
    file = h5py.File(stream, "r")
    contents.config = _text(file.attrs, _CONFIG)
    for path, item in _items(file, budget):
        if isinstance(item, h5py.Dataset):
            tensor = _tensor(path, item)
            if tensor is not None:
                budget.spend("tensors")
                contents.tensors[path] = tensor
            continue
        name = _text(item.attrs, "name")
        if name:
            contents.names[path] = name
        if "weight_names" in item.attrs:
            contents.collections.add(path)
    return contents


def _items(file: Group, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield every group and dataset that hard links of the file lead to, each once, in file order."""
    import h5py

    seen = {h5py.h5o.get_info(file.id).addr}
    pending: list[tuple[str, Group, int]] = [("", file, 0)]
    while pending:
        before, group, depth = pending.pop()
        inner = []
        for key in group:
            budget.spend("objects", 4)
            budget.check_time()
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                continue
            item, path = group[key], f"{before}{key}"
            address = h5py.h5o.get_info(item.id).addr
            if address in seen or not isinstance(item, (h5py.Group, h5py.Dataset)):
                continue
            seen.add(address)
            yield path, item
            if isinstance(item, h5py.Group) and depth < _DEEPEST:
                inner.append((f"{path}/", item, depth + 1))
        pending += reversed(inner)


def _tensor(path: str, dataset: Dataset) -> StoredTensor | None:
    """Return the tensor of a dataset; None for one that holds no numbers."""
    if dataset.shape is None or len(dataset.shape) > MAX_RANK:
        return None
    is_bfloat16 = dataset.dtype.itemsize == np.dtype("u2").itemsize and _text(dataset.attrs, "dtype") == "bfloat16"
    dtype = "bfloat16" if is_bfloat16 else torch_dtype(dataset.dtype.str[1:])
    return None if dtype is None else StoredTensor(dtype, dataset.shape, partial(_bits, path, dataset, is_bfloat16))


def _bits(path: str, dataset: Dataset, is_bfloat16: bool) -> NDArray[Any]:
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{path} lies in other files")
    creation = dataset.id.get_create_plist()
    filters = {creation.get_filter(index)[0] for index in range(creation.get_nfilters())}
    if not filters <= _BUILT_IN_FILTERS:
        raise ValueError(f"{path} is compressed in a way that only a plugin of HDF5 reads")
    if dataset.chunks and np.prod(dataset.chunks, dtype=np.float64) * dataset.dtype.itemsize > _LARGEST_CHUNK:
        raise ValueError(f"{path} has chunks of more than {_LARGEST_CHUNK >> 20} MB")
    values: NDArray[Any] = np.asarray(dataset[()])
    return values.view(np.uint16) if is_bfloat16 else values.astype(values.dtype.newbyteorder("="))


def _text(attributes: Any, name: str) -> str:  # noqa: ANN401 - h5py has no types
    """Return an attribute that is a text, or ""."""
    value = attributes.get(name, "")
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""
