import zipfile

import numpy as np
import pytest
import torch
from tests.samples import state_dict

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.content import open_content
from bnlab.observe.files.zip_file import read_zip


def test_an_archive_of_torch_and_one_of_numpy_have_the_same_tensors(tmp_path):
    state = state_dict("bn")
    torch.save(state, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", **{name: value.numpy() for name, value in state.items()})
    first, second = (read_zip(open_content(tmp_path / name)) for name in ("a.pt", "b.npz"))
    assert first.keys() == second.keys() == state.keys()
    assert all(np.array_equal(first[name].read(), second[name].read()) for name in state)


def test_a_checkpoint_of_torch_with_arrays_beside_it(tmp_path):
    torch.save(state_dict("bn"), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("a/extra/x.npy", b"no array")
    assert "bn.running_mean" in read_zip(open_content(tmp_path / "a.pt"))


def test_any_other_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(NotACheckpoint, match=r"zip archive that torch.save did not write"):
        read_zip(open_content(tmp_path / "a.zip"))
