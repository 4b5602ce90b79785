"""Tensors in pieces. The oracle is the array that numpy cuts into the pieces."""

import itertools

import numpy as np
import pytest

from bnlab.observe.files.split_tensor import Piece, SplitTensor
from bnlab.observe.files.tensors import StoredTensor

WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)


def piece(values, *offset):
    return Piece(offset, StoredTensor(str(values.dtype), values.shape, lambda: values))


def split(*pieces, shape=(4, 6), dtype="float32"):
    return SplitTensor(dtype, shape, pieces)


def blocks(rows, columns):
    return [
        piece(WHOLE[top:bottom, left:right], top, left)
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


@pytest.mark.parametrize(
    ("rows", "columns"), [([0, 4], [0, 6]), ([0, 2, 4], [0, 6]), ([0, 1, 4], [0, 5, 6]), ([0, 4, 4], [0, 6])]
)
def test_pieces_make_the_whole_in_any_sequence(rows, columns):
    pieces = blocks(rows, columns)
    tensor = split(*reversed(pieces)).whole()
    assert (tensor.dtype, tensor.shape) == ("float32", (4, 6))
    assert np.array_equal(tensor.read(), WHOLE)


def test_copies_of_a_piece_count_once():
    top = piece(WHOLE[:2], 0, 0)
    assert split(top, top).coverage() == (12, 24)
    assert split(top, top).whole() is None
    assert np.array_equal(split(top, top, piece(WHOLE[2:], 2, 0)).whole().read(), WHOLE)


def test_pieces_that_overlap_never_pass_as_the_whole():
    tensor = split(piece(WHOLE[:3], 0, 0), piece(WHOLE[2:3], 2, 0)).whole()
    with pytest.raises(ValueError, match="overlap"):
        tensor.read()


@pytest.mark.parametrize(
    "wrong",
    [
        piece(WHOLE[:2], 3, 0),
        piece(WHOLE[:2], -1, 0),
        piece(WHOLE[0], 0),
        piece(WHOLE.astype(np.float64), 0, 0),
        piece(WHOLE, "0", 0),
    ],
)
def test_a_piece_outside_its_tensor_is_refused(wrong):
    with pytest.raises(ValueError, match="outside"):
        split(wrong)


@pytest.mark.parametrize("shape", [(-1,), ("4",), (1,) * 65])
def test_an_impossible_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        split(shape=shape)


def test_pieces_of_two_files_are_joined():
    top, bottom = split(piece(WHOLE[:2], 0, 0)), split(piece(WHOLE[2:], 2, 0))
    assert np.array_equal(SplitTensor.joined([top, bottom]).whole().read(), WHOLE)
    with pytest.raises(ValueError, match="pieces of one tensor"):
        SplitTensor.joined([top, split(shape=(4, 7))])


def test_tensors_without_dimensions_or_values():
    assert (
        split(
            piece(
                np.float32(3).reshape(()),
            ),
            shape=(),
        )
        .whole()
        .read()
        == 3
    )
    assert split(piece(WHOLE[:0], 0, 0), shape=(0, 6)).whole().read().shape == (0, 6)
    assert split(shape=(0, 6)).whole().read().shape == (0, 6)


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ([(0, 5)], "values 5 to 8 of the 9"),
        ([(5, 9)], "values 0 to 4 of the 9"),
        ([(6, 9), (0, 3)], "values 3 to 5 of the 9"),
        ([], "9 of the 9 values"),
    ],
)
def test_missing_values_are_named(parts, missing):
    values = np.arange(9, dtype=np.float32)
    assert split(*(piece(values[a:b], a) for a, b in parts), shape=(9,)).missing() == missing
    assert split(*blocks([0, 3], [0, 6])).missing() == "6 of the 24 values"
