import io
import os
import socket
import zipfile
from pathlib import Path

import pytest

from bnlab.errors import DamagedFile, NotACheckpoint, UnreadableFile
from bnlab.observe.files.content import Span, open_content


def test_the_bytes_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    content = open_content(path)
    assert content.size == 10
    assert content.read_at(2, 3) == b"234"
    assert content.head(2) == b"01"
    assert content.head(99) == b"0123456789"
    assert content.span(2, 5).part(1, 2).read() == b"34"
    assert content.span(8).read() == b"89"
    for start, size in ((-1, 2), (4, 7), (11, 0), (2, -1)):
        with pytest.raises(ValueError, match="reach beyond"):
            content.span(start, size)


def test_bytes_in_memory_are_a_span_too():
    assert Span.of(b"0123456789").part(2, 5).part(1, 2).read() == b"34"


def test_a_file_that_is_cut_off_while_it_is_read_ends_in_one_line(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100_000))
    content = open_content(path)
    os.truncate(path, 10)
    with pytest.raises(DamagedFile, match=r"keep its 100000 bytes while it is read, got an end at byte 10\."):
        content.read_at(5, 50_000)
    with pytest.raises(DamagedFile, match="got an end at byte 10"):
        content.stream().read()


def test_a_file_that_grows_ends_where_it_ended(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    content = open_content(path)
    path.write_bytes(b"0123456789")
    assert content.stream().read() == b"0123"


def test_a_stream_seeks_as_a_file_does(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    stream = open_content(path).stream()
    assert (stream.seek(-3, os.SEEK_END), stream.read(2), stream.tell()) == (7, b"78", 9)
    assert (stream.seek(2), stream.seek(2, os.SEEK_CUR), stream.read()) == (2, 4, b"456789")
    assert stream.read() == b""
    assert (stream.seek(1 << 20), stream.read(), stream.seek(0, os.SEEK_CUR)) == (1 << 20, b"", 1 << 20)
    with pytest.raises(ValueError, match="before the beginning"):
        stream.seek(-11, os.SEEK_END)


def test_the_descriptor_is_closed_with_the_last_span(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    descriptors = len([*Path("/dev/fd").iterdir()])
    span = open_content(path).span()
    assert span.read() == b"0123"
    del span
    assert len([*Path("/dev/fd").iterdir()]) == descriptors


def test_zipfile_reads_from_content(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("name", b"inside")
    path = tmp_path / "a.zip"
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(open_content(path).stream()) as archive:
        assert archive.read("name") == b"inside"


def test_empty_missing_and_special_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(NotACheckpoint, match="empty file"):
        open_content(tmp_path / "empty")
    with pytest.raises(UnreadableFile, match="no such file"):
        open_content(tmp_path / "absent")
    with pytest.raises(UnreadableFile, match="regular file"):
        open_content(tmp_path)


def test_pipes_devices_sockets_and_loops_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    Path("loop").symlink_to("loop")
    Path("to_pipe").symlink_to("pipe")
    for name in ("pipe", "to_pipe", "socket", "loop", "/dev/zero", "/dev/stdin"):
        with pytest.raises(UnreadableFile, match=r"regular file|no such device|too many levels"):
            open_content(Path(name))
    listener.close()


def test_a_missing_file_is_reported_with_one_that_is_alike(tmp_path):
    for name in ("resnet18.pt", "resnet18.py", "resnet18.pth"):
        (tmp_path / name).write_bytes(b"0")
    with pytest.raises(UnreadableFile, match=r"got: no such file or directory\. Did you mean 'resnet18\.pt'\?$"):
        open_content(tmp_path / "resnet1.pt")
    for path in ("other.pt", "absent/resnet18.pt", "resnet18.onnx"):
        with pytest.raises(UnreadableFile, match=r"got: no such file or directory\.$"):
            open_content(tmp_path / path)


def test_a_part_is_a_file_of_its_own(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    whole = open_content(path)
    part = whole.part(2, 5)
    assert (part.size, part.head(99), part.span(1, 2).read(), part.stream().read()) == (5, b"23456", b"34", b"23456")
    assert part.budget is whole.budget
    assert part.part(1, 3).head(9) == b"345"
    for start, size in ((0, 11), (-1, 2), (6, 5)):
        with pytest.raises(ValueError, match="reach beyond"):
            whole.part(start, size)
    with pytest.raises(DamagedFile):
        part.read_at(3, 5)


def test_files_that_are_read_together_share_their_budget(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"0")
    budget = open_content(tmp_path / "a.bin").budget
    assert open_content(tmp_path / "a.bin", budget).budget is budget
    assert open_content(tmp_path / "a.bin").budget is not budget
