"""DTensors and ShardedTensors in a pickle. The oracle of a block is torch itself."""

import numpy as np
import pytest
import torch
from tests.ranks import distributed, rank_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bnlab.observe.files.checkpoint import read_stored
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.sharded_tensor import distributed_tensor, size_of
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.tensors import StoredTensor

WHOLE = torch.arange(35.0).reshape(7, 5)


def stored(tensor, path):
    torch.save({"x": tensor}, path)
    return read_stored(path).tree["x"]


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (2, 2), (8,)])
@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (None, 0), (1, None), (None, None), (-1, None)])
def test_blocks_lie_where_torch_puts_them(shape, dims, tmp_path):
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims[: len(shape)]]
    pieces = []
    for rank in range(int(np.prod(shape))):
        with rank_of(rank, *shape) as mesh:
            tensor = distributed(WHOLE, mesh, *placements)
            sizes, offset = compute_local_shape_and_global_offset(WHOLE.shape, mesh, placements)
            read = stored(tensor, tmp_path / f"a{'x' * rank}.pt")
        if tuple(sizes) == (7, 5):
            assert isinstance(read, StoredTensor)
            assert np.array_equal(read.read(), WHOLE.numpy())
            continue
        (piece,) = read.pieces
        assert piece.tensor.shape == tuple(sizes)
        assert piece.offset == tuple(offset) or 0 in sizes
        pieces.append(read)
    if pieces:
        assert np.array_equal(SplitTensor.joined(pieces).whole().read(), WHOLE.numpy())


def test_summands_are_no_blocks(tmp_path):
    with rank_of(0, 2) as mesh:
        read = stored(DTensor.from_local(WHOLE, mesh, [Partial()], run_check=False), tmp_path / "a.pt")
    assert read == SplitTensor("float32", (7, 5), ())


def test_parameters_are_tensors_too(tmp_path):
    with rank_of(1, 2) as mesh:
        read = stored(torch.nn.Parameter(distributed(WHOLE, mesh, Shard(0))), tmp_path / "a.pt")
    assert read.pieces[0].offset == (4, 0)


def rebuilt(spec, kind="torch.distributed.tensor.DTensor", size=(9,), local=(5,)):
    """Return what a pickle with another specification stands for."""
    module, _, name = kind.rpartition(".")
    arguments = (Global(module, name), Global("torch", "float32"), size, (1,), 0, None, None, False)
    state = {"_local_tensor": StoredTensor("float32", local, lambda: np.zeros(local)), "_spec": object_of("Spec", spec)}
    return distributed_tensor(arguments, (None, state))


def object_of(name, state=None, arguments=()):
    return InertObject(Global("torch.distributed.tensor", name), arguments, state=state)


SHARD = object_of("Shard", {"dim": 0})
OLD_MESH = {"mesh": StoredTensor("int32", (2,), lambda: np.arange(2)), "_coordinate_on_dim": [0]}
LAYOUT = {"_layout": object_of("_MeshLayout", {"shape": (2,), "stride": (1,)}), "_coordinate_on_dim": (0,)}
SPEC = {"mesh": object_of("DeviceMesh", OLD_MESH), "placements": (SHARD,)}


@pytest.mark.parametrize("mesh", [OLD_MESH, LAYOUT, {**LAYOUT, "_layout": object_of("L", {"shape": 2})}])
def test_the_meshes_of_other_versions(mesh):
    assert rebuilt({**SPEC, "mesh": object_of("DeviceMesh", mesh)}).pieces[0].offset == (0,)


@pytest.mark.parametrize(
    "changes",
    [
        {"placements": (object_of("_StridedShard", {"dim": 0}),)},
        {"placements": (object_of("Shard", {"dim": 1}),)},
        {"placements": (object_of("Shard", {"dim": "0"}),)},
        {"placements": (SHARD, SHARD)},
        {"placements": None},
        {"mesh": object_of("DeviceMesh", {})},
        {"mesh": object_of("DeviceMesh", {**OLD_MESH, "_coordinate_on_dim": None})},
        {"mesh": object_of("DeviceMesh", {**OLD_MESH, "_coordinate_on_dim": [2]})},
        {"mesh": object_of("DeviceMesh", {**LAYOUT, "_layout": object_of("L", {"shape": (-2,)})})},
        {"shard_order": (object_of("ShardOrderEntry", arguments=(0, (1, 0))),)},
    ],
)
def test_no_piece_is_at_hand_where_its_place_is_not_known(changes):
    assert rebuilt(SPEC | changes) == SplitTensor("float32", (9,), ())


def test_a_local_tensor_of_another_size_is_no_piece():
    assert rebuilt(SPEC, local=(4,)).pieces == ()


def test_tensors_of_other_classes_are_not_read():
    assert rebuilt(SPEC, kind="torch.distributed.other.Tensor") is None
    assert rebuilt(SPEC, kind="mine.DTensor") is None


def test_the_pieces_of_a_sharded_tensor():
    def shard(offset, length):
        tensor = StoredTensor("float32", (length,), lambda: np.full(length, offset, dtype=np.float32))
        place = object_of("ShardMetadata", (None, {"shard_offsets": [offset], "shard_sizes": [length]}))
        return object_of("Shard", (None, {"tensor": tensor, "metadata": place}))

    kind = Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
    arguments = (kind, Global("torch", "float32"), (9,))
    first = distributed_tensor(arguments, ([shard(0, 5)], None))
    assert first.missing() == "values 5 to 8 of the 9"
    whole = distributed_tensor(arguments, ([shard(5, 4), shard(0, 5)], None))
    assert whole.read().tolist() == [0.0] * 5 + [5.0] * 4


def test_sizes():
    assert size_of(InertObject(Global("torch", "Size"), ((2, 3),))) == size_of((2, 3)) == (2, 3)
    for wrong in ("23", (2, "3"), InertObject(Global("os", "system"), ((2, 3),)), (True,)):
        with pytest.raises(TypeError, match="shape"):
            size_of(wrong)
