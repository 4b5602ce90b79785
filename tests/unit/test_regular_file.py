import os
import socket
from pathlib import Path

import pytest

from bnlab import regular_file
from bnlab.errors import DamagedFile, UnreadableFile
from bnlab.regular_file import open_regular, read_whole

NOT_REGULAR = "file must be a regular file, got a folder, pipe or device."


@pytest.fixture
def a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        yield tmp_path / "socket"


def refused(path):
    with pytest.raises(UnreadableFile) as error:
        open_regular(path)
    return str(error.value)


def test_a_regular_file_is_read_also_behind_a_link(tmp_path):
    content = bytes(range(256)) * 8192
    (tmp_path / "real").write_bytes(content)
    (tmp_path / "link").symlink_to("real")
    descriptor = open_regular(tmp_path / "link")
    assert os.read(descriptor, 4) == b"\0\1\2\3"
    os.close(descriptor)
    assert read_whole(tmp_path / "link", len(content)) == content
    (tmp_path / "empty").touch()
    assert read_whole(tmp_path / "empty", 0) == b""


@pytest.mark.skipif(os.name != "posix", reason="pipes, sockets, devices and links of POSIX")
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, a_socket):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", a_socket, Path("/dev/zero"), Path("/dev/null")):
        assert refused(path) == NOT_REGULAR, path
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refused(tmp_path / "a") == "file must be readable, got: too many levels of symbolic links."


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_name_that_stands_for_a_pipe_by_the_time_it_is_opened(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    opened = []
    really = os.open

    def exchanged(path, flags):
        opened.append(really(tmp_path / "pipe", flags))
        return opened[0]

    monkeypatch.setattr(regular_file.os, "open", exchanged)
    assert refused(tmp_path / "file") == NOT_REGULAR
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_names_that_no_file_has(tmp_path):
    (tmp_path / "resnet18.json").touch()
    assert refused(tmp_path / "resnet1.json") == (
        "file must be readable, got: no such file or directory. Did you mean 'resnet18.json'?"
    )
    assert refused(tmp_path / "a\0b") == "file must be readable, got: embedded null byte."
    assert refused(tmp_path / ("n" * 300)) == "file must be readable, got: file name too long."


def test_a_large_file_is_refused_by_its_size_before_it_is_read(tmp_path, monkeypatch):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no such disk is needed
    monkeypatch.setattr(regular_file.os, "read", lambda *_: pytest.fail("the file is read"))
    with pytest.raises(DamagedFile) as error:
        read_whole(tmp_path / "large", 1 << 28)
    assert str(error.value) == (f"{tmp_path / 'large'}: file must have at most 268435456 bytes, got 1099511627776.")


def test_a_file_that_grows_while_it_is_read_stays_below_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "growing"
    path.write_bytes(b"1234")
    monkeypatch.setattr(regular_file.os, "read", lambda _, size: b"x" * min(size, 3))
    with pytest.raises(DamagedFile, match="file must have at most 10 bytes, got 11"):
        read_whole(path, 10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="files of Linux that state no size")
def test_a_file_of_the_kernel_that_states_no_size():
    assert read_whole(Path("/proc/self/status"), 1 << 20).startswith(b"Name:")


def test_messages_of_whole_files_begin_with_the_path(tmp_path):
    with pytest.raises(UnreadableFile) as error:
        read_whole(tmp_path, 1)
    assert str(error.value) == f"{tmp_path}: {NOT_REGULAR}"
