import os
import stat
from pathlib import Path

import pytest

import bnlab
from bnlab.atomic_file import write_whole
from bnlab.errors import BnlabError, UnreadableFile, UnwritableFile


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(b"one", path)
    write_whole(b"two", path)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_it_has_the_permissions_of_a_file_that_was_opened(tmp_path):
    (tmp_path / "opened").write_bytes(b"")
    write_whole(b"", tmp_path / "written")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.skipif(os.name != "posix", reason="links and devices of POSIX")
def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write_whole(b"x", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"
    write_whole(b"x", Path(os.devnull))
    assert not Path(os.devnull).is_file()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UnwritableFile) as error:
        write_whole(b"new", path)
    assert str(error.value) == f"{path}: file must be writable, got: no space left on device."
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_has_an_error_of_its_own(tmp_path):
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(UnwritableFile) as error:
        write_whole(b"", path, option="--output")
    assert str(error.value) == f"--output: path must be writable, got {path}: no such file or directory."
    assert isinstance(error.value, BnlabError)
    assert isinstance(error.value, OSError)
    assert not isinstance(error.value, UnreadableFile)


def test_the_lab_raises_the_same_error(tmp_path):
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(UnwritableFile, match="folder must be writable, got: file exists"):
        bnlab.lab.run("train-eval", batches=(2,), updates=(1,), folder=tmp_path / "a-file")
