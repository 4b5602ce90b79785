import numpy as np
import pytest
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
