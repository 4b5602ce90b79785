"""Trees of several files as one."""

import numpy as np
import pytest

from bnlab.observe.evidence import Evidence
from bnlab.observe.files.several_files import NetworkFiles, joined
from bnlab.observe.files.split_tensor import Piece, SplitTensor
from bnlab.observe.files.tensors import StoredTensor


def tensor(*values):
    array = np.array(values, dtype=np.float32)
    return StoredTensor("float32", array.shape, lambda: array)


def piece(offset, *values):
    return SplitTensor("float32", (3,), (Piece((offset,), tensor(*values)),))


def test_files_with_different_tensors():
    tree = joined({"a": {"model": {"x": tensor(1)}, "epoch": 3}, "b": {"model": {"y": tensor(2)}}}, of_ranks=False)
    assert {name: value.read().tolist() for name, value in tree["model"].items()} == {"x": [1.0], "y": [2.0]}
    assert tree["epoch"] == 3


def test_one_tensor_in_two_files_is_an_error():
    with pytest.raises(ValueError, match="x lies in 2 of the files"):
        joined({"a": {"x": tensor(1)}, "b": {"x": tensor(1)}}, of_ranks=False)


def test_the_files_of_ranks():
    first = {"x": piece(0, 1, 2), "buffer": tensor(5)}
    second = {"x": piece(2, 3), "buffer": tensor(6), "more": tensor(7)}
    tree = joined({"a": first, "b": second}, of_ranks=True)
    assert {name: value.read().tolist() for name, value in tree.items()} == {
        "x": [1.0, 2.0, 3.0],
        "buffer": [5.0],
        "more": [7.0],
    }


def test_pieces_that_are_missing_stay_so():
    tree = joined({"a": {"x": piece(0, 1)}, "b": {"x": piece(2, 3)}}, of_ranks=True)
    assert tree["x"].missing() == "values 1 to 1 of the 3"


def test_trees_that_contain_themselves():
    trees = {"a": {"x": tensor(1)}, "b": {"y": tensor(2)}}
    for tree in trees.values():
        tree["self"] = tree
    tree = joined(trees, of_ranks=False)
    assert tree["self"] is tree
    assert tree.keys() == {"x", "y", "self"}


def test_evidence_on_a_network_that_lacks_a_file():
    files = NetworkFiles({}, (("", "lacks b.pt"),), "Copy it.")
    evidence = files.completing(Evidence((), incomplete=(("bn", "has no running_var"),)))
    assert evidence.incomplete == (("", "lacks b.pt"), ("bn", "has no running_var"))
    assert evidence.way_to_the_rest == "Copy it."
