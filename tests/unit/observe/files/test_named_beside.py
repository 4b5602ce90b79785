"""Names by which one file refers to others: a download must not choose which files of the user are read."""

import pytest

from bnlab.errors import DamagedFile
from bnlab.observe.files.named_beside import file_beside


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(b"secret")
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["a.bin", "sub/a.bin", "./a.bin", "none.bin", "a b.bin", "..a.bin"])
def test_files_in_the_folder(index, name):
    assert file_beside(index, name) == index.parent / name


@pytest.mark.parametrize(
    "name", ["../secret.bin", "sub/../../secret.bin", "/etc/passwd", "", ".", "..", "a\0b", 7, None, "sub/.."]
)
def test_files_elsewhere_are_refused(index, name):
    with pytest.raises(DamagedFile, match="its own folder"):
        file_beside(index, name)


def test_a_link_out_of_the_folder_is_refused(index, tmp_path):
    (index.parent / "a.bin").symlink_to(tmp_path / "secret.bin")
    (index.parent / "up").symlink_to(tmp_path, target_is_directory=True)
    for name in ("a.bin", "up/secret.bin"):
        with pytest.raises(DamagedFile, match=r"a link to .*secret\.bin"):
            file_beside(index, name)


def test_the_cache_of_hugging_face_keeps_all_files_of_a_model_in_one_other_folder(index, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, blob in ((index.name, "0"), ("a.bin", "1")):
        (blobs / blob).write_bytes(b"")
        (index.parent / name).symlink_to(blobs / blob)
    assert file_beside(index, "a.bin") == index.parent / "a.bin"


def test_a_circle_of_links_is_left_to_who_opens_it(index):
    (index.parent / "a.bin").symlink_to("a.bin")
    assert file_beside(index, "a.bin") == index.parent / "a.bin"
