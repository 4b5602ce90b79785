import pickle

import numpy as np
import pytest
import torch
from tests.samples import save

from bnlab.observe.files.checkpoint import read_stored
from bnlab.observe.files.numpy_data import as_stored_tensor

formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def read(path):
    return read_stored(path).tree


@formats
@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.arange(6, dtype=">i4").reshape(2, 3).T, np.float16([1, 2])]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_arrays_are_read_too(tmp_path, legacy, protocol, array):
    tree = read(save({"a": array}, tmp_path / "a.pt", legacy=legacy, protocol=protocol))
    stored = as_stored_tensor(tree["a"])
    assert stored.shape == array.shape
    assert np.array_equal(stored.read(), array)


def test_other_arrays_are_left_as_they_are(tmp_path):
    tree = read(save({"a": np.array(["x"]), "b": np.array([1j])}, tmp_path / "a.pt"))
    assert as_stored_tensor(tree["a"]) is as_stored_tensor(tree["b"]) is as_stored_tensor(3) is None


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_without_torch_are_read(tmp_path, protocol):
    """Detectron2 writes such files, with numpy arrays of any size."""
    arrays = {
        "small": np.arange(4, dtype=np.float32),
        "large": np.arange(300_000, dtype=np.float64),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(0.5),
        "count": np.int64(391),
        "record": np.arange(3, dtype=np.int8).view(Tagged),
    }
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}, protocol))
    tree = read(path)["model"]
    for name, array in arrays.items():
        stored = as_stored_tensor(tree[name])
        assert stored.shape == np.shape(array)
        assert np.array_equal(stored.read(), array)


class Tagged(np.ndarray):
    """An array of a class of its own."""


def test_the_paths_of_numpy_1(tmp_path):
    path = tmp_path / "model.pkl"
    data = pickle.dumps({"a": np.arange(4.0), "b": np.float64(3)}, 2)
    assert b"numpy._core" in data
    path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    tree = read(path)
    assert as_stored_tensor(tree["a"]).read().tolist() == [0, 1, 2, 3]
    assert as_stored_tensor(tree["b"]).read().tolist() == 3


def test_arrays_that_claim_more_than_they_have(tmp_path):
    path = tmp_path / "model.pkl"
    for protocol in (2, 4):
        data = pickle.dumps(np.arange(5000.0), protocol)
        changed = data.replace(b"M\x88\x13", b"M\x89\x13")
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="needs 40008 bytes"):
            as_stored_tensor(read(path)).read()


def test_a_tensor_of_torch_in_a_pickle_without_it(tmp_path):
    """`pickle.dump` of a tensor puts a whole file of torch.save into the pickle."""
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": torch.arange(3.0), "b": torch.zeros(3000)}))
    tree = read(path)
    assert tree["a"].read().tolist() == [0, 1, 2]
    assert tree["b"].shape == (3000,)


class PaddleTensor:
    """Pickles as `paddle.save` lets tensors pickle: `_pickle_save` in python/paddle/framework/io.py."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "call", [lambda array: (tuple, (("bn_0.w_1", array),)), lambda array: (eval, ("data", {"data": array}))]
)
def test_tensors_inside_other_objects_as_paddle_saves_them(tmp_path, protocol, call):
    path = tmp_path / "model.pdparams"
    array = np.arange(4, dtype=np.float32)
    path.write_bytes(pickle.dumps({"model": {"bn._mean": PaddleTensor(call(array))}}, protocol))
    assert np.array_equal(as_stored_tensor(read(path)["model"]["bn._mean"]).read(), array)


def test_a_tensor_with_its_name_counts_as_the_tensor(tmp_path):
    """This is what `paddle.save` leaves behind once its file is loaded without Paddle and pickled again."""
    path = tmp_path / "model.pdparams"
    pairs = {"a": ("bn_0.w_1", np.arange(3.0)), "b": ("x", 3), "c": (np.arange(3.0), "x")}
    path.write_bytes(pickle.dumps(pairs, 4))
    tree = read(path)
    assert as_stored_tensor(tree["a"]).read().tolist() == [0, 1, 2]
    assert as_stored_tensor(tree["b"]) is as_stored_tensor(tree["c"]) is None
