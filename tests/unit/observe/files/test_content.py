import io
import zipfile

import pytest

from bnlab.errors import NotACheckpoint, UnreadableFile
from bnlab.observe.files.content import open_content


def test_the_bytes_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    content = open_content(path)
    assert content[2:5] == b"234"
    assert len(content) == 10


def test_zipfile_reads_from_content(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("name", b"inside")
    path = tmp_path / "a.zip"
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(open_content(path)) as archive:
        assert archive.read("name") == b"inside"


def test_content_cannot_be_written_to(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    with pytest.raises(TypeError):
        open_content(path)[0] = 1


def test_empty_missing_and_special_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(NotACheckpoint, match="empty file"):
        open_content(tmp_path / "empty")
    with pytest.raises(UnreadableFile, match="no such file"):
        open_content(tmp_path / "absent")
    with pytest.raises(UnreadableFile, match="regular file"):
        open_content(tmp_path)


def test_a_missing_file_is_reported_with_one_that_is_alike(tmp_path):
    for name in ("resnet18.pt", "resnet18.py", "resnet18.pth"):
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(UnreadableFile, match=r"got: no such file or directory\. Did you mean 'resnet18\.pt'\?$"):
        open_content(tmp_path / "resnet1.pt")
    for path in ("other.pt", "absent/resnet18.pt", "resnet18.onnx"):
        with pytest.raises(UnreadableFile, match=r"got: no such file or directory\.$"):
            open_content(tmp_path / path)
