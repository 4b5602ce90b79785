"""Reads the tensors of ``torch.distributed`` in a pickle: the piece that one rank holds, and its place in the whole.

A DTensor is the local tensor of a rank and a specification: the mesh of ranks, and for each dimension of the mesh
whether the ranks hold copies of the tensor (``Replicate``) or blocks of one of its dimensions (``Shard``). Blocks are
those of ``torch.chunk``. A ShardedTensor, which FSDP1 saves, lists the offset of each of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bnlab.observe.files.pickle_data import Data, Global, InertObject
from bnlab.observe.files.split_tensor import Piece, SplitTensor
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["WRAPPER", "attributes_of", "distributed_tensor", "size_of"]

WRAPPER = "torch._utils._rebuild_wrapper_subclass"
"""The function with which pickles rebuild tensors that hold other tensors."""


def distributed_tensor(arguments: tuple[Data, ...], state: Data) -> StoredTensor | SplitTensor | None:
    """Return the tensor of a DTensor or ShardedTensor, or the pieces of it that the pickle holds.

    Args:
        arguments: Those of `WRAPPER`: the class, dtype, shape, strides and others.
        state: The attributes that are set afterwards.

    Returns:
        The whole tensor if the pickle holds it. No piece is at hand where the pickle does not show its place in the
        whole, or where it holds a summand instead of a block. None for a tensor of another class.

    Raises:
        ValueError: If a piece lies outside its tensor.
    """
    kind, dtype, size = arguments[:3]
    if not (isinstance(kind, Global) and kind.module.startswith("torch.distributed.") and isinstance(dtype, Global)):
        return None
    match kind.name:
        case "DTensor":
            pieces = _local_piece(attributes_of(state), size_of(size))
        case "ShardedTensor":
            pieces = tuple(_listed_pieces(state))
        case _:
            return None
    tensor = SplitTensor(dtype.name, size_of(size), pieces)
    return tensor.whole() or tensor


def attributes_of(state: Data) -> Mapping[str, Data]:
    """Return the attributes in a state: a dict, or a pair of a dict and the slots; those of an object are its state."""
    if isinstance(state, InertObject):
        state = state.state
    parts = state if isinstance(state, (tuple, list)) else [state]
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def size_of(size: Data) -> tuple[int, ...]:
    """Return a torch.Size, which a pickle holds as a tuple or as a call.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(size, InertObject) and size.kind.path == "torch.Size":
        size = size.arguments[0] if size.arguments else ()
    if not isinstance(size, (tuple, list)) or not all(type(length) is int for length in size):
        raise TypeError("the shape of a distributed tensor is no tuple of numbers")
    return tuple(size)


def _listed_pieces(state: Data) -> Iterator[Piece]:
    """Yield the pieces of a ShardedTensor, whose state begins with the list of them."""
    for shard in state[0]:
        parts = attributes_of(shard)
        offset = attributes_of(parts.get("metadata")).get("shard_offsets")
        if isinstance(parts.get("tensor"), StoredTensor) and isinstance(offset, (list, tuple)):
            yield Piece(tuple(offset), parts["tensor"])


def _local_piece(state: Mapping[str, Data], size: tuple[int, ...]) -> tuple[Piece, ...]:
    local, spec = state.get("_local_tensor"), attributes_of(state.get("_spec"))
    block = _block(spec, size)
    if not isinstance(local, StoredTensor) or block is None:
        return ()
    offset, shape = block
    return (Piece(offset, local),) if local.shape == shape else ()


def _block(spec: Mapping[str, Data], size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the offset and shape of the block that this rank holds; None if the specification does not show it."""
    mesh = attributes_of(spec.get("mesh"))
    ranks, placements = _mesh_shape(mesh), spec.get("placements")
    if ranks is None or not isinstance(placements, (tuple, list)) or len(placements) != len(ranks):
        return None
    if not _cuts_in_sequence(spec.get("shard_order")):
        return None
    places = mesh.get("_coordinate_on_dim")
    if not isinstance(places, (tuple, list)) or len(places) != len(ranks):
        places = [0 if count == 1 else None for count in ranks]
    offset, shape = [0] * len(size), list(size)
    for count, at, placement in zip(ranks, places, placements, strict=True):
        dim = _sharded_dimension(placement, len(size), count)
        if dim == _WHOLE:
            continue
        if dim is None or type(at) is not int or not 0 <= at < count:
            return None
        step = -(-shape[dim] // count)
        begin = min(at * step, shape[dim])
        offset[dim] += begin
        shape[dim] = min(step, shape[dim] - begin)
    return tuple(offset), tuple(shape)


def _cuts_in_sequence(entries: Data) -> bool:
    """Return whether every dimension is cut along the first dimension of the mesh first, as is usual."""
    if not isinstance(entries, (tuple, list)):
        return True  # before torch 2.10 no other sequence exists
    cuts = [entry.arguments[1] for entry in entries if isinstance(entry, InertObject) and len(entry.arguments) == 2]
    return all(isinstance(dims, (tuple, list)) and list(dims) == sorted(dims) for dims in cuts)


_WHOLE = -1


def _sharded_dimension(placement: Data, dimensions: int, ranks: int) -> int | None:
    """Return which dimension is cut into blocks, `_WHOLE` for none, or None where the values are no block."""
    name = placement.kind.name if isinstance(placement, InertObject) else None
    if name == "Replicate" or (ranks == 1 and name in ("Shard", "_StridedShard", "Partial", "_Partial")):
        return _WHOLE
    if name != "Shard":
        return None
    dim = attributes_of(placement).get("dim", placement.arguments[0] if placement.arguments else None)
    return dim % dimensions if type(dim) is int and dimensions and -dimensions <= dim < dimensions else None


def _mesh_shape(mesh: Mapping[str, Data]) -> list[int] | None:
    """Return how many ranks a mesh has along each of its dimensions; the versions of torch store it differently."""
    stored = mesh.get("mesh")
    if isinstance(stored, StoredTensor):
        return list(stored.shape)
    layout = attributes_of(mesh.get("_layout"))
    lengths = [attributes_of(axis).get("shape") for axis in layout["axes"]] if "axes" in layout else layout.get("shape")
    if type(lengths) is int:
        lengths = [lengths]
    if not isinstance(lengths, (tuple, list)):
        return None
    counts = [_product(length) for length in lengths]
    return None if None in counts else [count for count in counts if count is not None]


def _product(length: Data) -> int | None:
    """Return the number of ranks along one dimension of a mesh, which may itself be a flat or a nested layout."""
    lengths: Sequence[Data] = length if isinstance(length, (tuple, list)) else [length]
    return math.prod(lengths) if all(type(count) is int and count > 0 for count in lengths) else None
