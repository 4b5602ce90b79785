import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import bnlab
from bnlab import atomic_file
from bnlab.atomic_file import require_writable, write_whole
from bnlab.errors import BnlabError, BnlabWarning, UnreadableFile, UnwritableFile

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, links and devices of POSIX")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root alone may do this")

WRITER = """
import sys
from pathlib import Path
from bnlab.atomic_file import write_whole

path, letter = Path(sys.argv[1]), sys.argv[2].encode()
sys.stdin.readline()
for _ in range(50):
    write_whole(letter * 100_000, path)
"""


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def refused(path, option=None):
    """Return the message with which both functions refuse a path."""
    with pytest.raises(UnwritableFile) as early:
        require_writable(path, option=option)
    with pytest.raises(UnwritableFile) as late:
        write_whole(b"new", path, option=option)
    assert str(early.value) == str(late.value)
    return str(late.value)


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(b"one", path)
    write_whole(b"two", path)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_a_file_that_was_opened(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "opened").write_bytes(b"")
        write_whole(b"", tmp_path / "written")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "written") == mode_of(tmp_path / "opened") == 0o666 & ~mask


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(b"new", path)
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)


@posix
def test_a_program_loses_the_bits_that_every_write_takes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o4755)
    write_whole(b"new", path)
    assert mode_of(path) == 0o755


@posix
def test_the_new_content_is_never_more_readable_than_the_old(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    path.chmod(0o600)
    modes = []

    def sync(descriptor):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(atomic_file, "_keep_attributes", lambda descriptor, *_: sync(descriptor) or [])
    monkeypatch.setattr(atomic_file, "_sync", sync)
    write_whole(b"new", path)
    assert modes == [0o600, 0o600]


@root
def test_a_file_of_somebody_else_keeps_its_owner(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write_whole(b"new", path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode_of(path)) == (12345, 23456, 0o640)


@root
def test_an_owner_that_cannot_be_kept_is_named_and_another_group_gets_no_more_than_everybody(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    path.chmod(0o660)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic_file.os, "fchown", refuse)
    with pytest.warns(BnlabWarning, match=r"a.txt: the owner .* cannot be kept \(user 12345, group 23456\)\.$"):
        write_whole(b"new", path)
    assert (path.read_bytes(), mode_of(path), path.stat().st_uid) == (b"new", 0o600, 0)


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="extended attributes of Linux")
def test_extended_attributes_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    try:
        os.setxattr(path, "user.origin", b"\0here")
    except OSError:
        pytest.skip("a file system without extended attributes")
    write_whole(b"new", path)
    assert (path.read_bytes(), os.getxattr(path, "user.origin")) == (b"new", b"\0here")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic_file.os, "setxattr", refuse)
    with pytest.warns(BnlabWarning, match=r"a.txt: not all extended attributes of the old file can be kept\.$"):
        write_whole(b"newer", path)
    assert path.read_bytes() == b"newer"


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="access lists of Linux")
def test_an_access_list_is_kept_and_that_of_the_folder_does_not_replace_its_absence(tmp_path):
    def entry(tag, permissions, user=0xFFFFFFFF):
        return tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + user.to_bytes(4, "little")

    # acl(5): version 2; owner, a user, group, mask, others
    acl = b"\2\0\0\0" + entry(1, 6) + entry(2, 4, 12345) + entry(4, 0) + entry(16, 4) + entry(32, 0)
    path, plain = tmp_path / "a.txt", tmp_path / "plain.txt"
    path.write_bytes(b"old")
    plain.write_bytes(b"old")
    plain.chmod(0o640)
    try:
        os.setxattr(path, "system.posix_acl_access", acl)
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("a file system without access lists")
    write_whole(b"new", path)
    write_whole(b"new", plain)
    assert os.getxattr(path, "system.posix_acl_access") == acl
    assert "system.posix_acl_access" not in os.listxattr(plain)
    assert (mode_of(path), mode_of(plain)) == (0o640, 0o640)


@posix
def test_a_read_only_file_is_refused_also_for_root(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    path.chmod(0o444)
    assert refused(path, "--output") == (
        f"--output: path must be writable, got {path}: read-only file. Choose another path, or make it writable: "
        f"chmod u+w {path}."
    )
    (tmp_path / "link").symlink_to("a.txt")
    assert "read-only file" in refused(tmp_path / "link")
    assert (path.read_bytes(), mode_of(path)) == (b"old", 0o444)
    path.chmod(0o644)
    write_whole(b"new", path)
    assert path.read_bytes() == b"new"


@posix
def test_a_file_that_this_process_may_not_write_is_refused(tmp_path, monkeypatch):
    """Its folder would let it be replaced."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    monkeypatch.setattr(atomic_file.os, "access", lambda *_, **__: False)
    monkeypatch.setattr(atomic_file.os, "supports_effective_ids", {atomic_file.os.access})
    assert refused(path) == f"{path}: file must be writable, got: permission denied."
    assert path.read_bytes() == b"old"


@posix
def test_a_hard_link_that_is_cut_is_named(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_bytes(b"old")
    os.link(path, other)
    with pytest.warns(BnlabWarning) as record:
        write_whole(b"new", path)
    assert [str(warning.message) for warning in record] == [
        f"{path}: the hard link is cut: the old content stays under 1 other name of the old file."
    ]
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")


@posix
def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write_whole(b"x", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"
    write_whole(b"x", Path(os.devnull))
    assert not Path(os.devnull).is_file()


@posix
def test_a_pipe_and_a_terminal_are_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    contents = []
    reader = threading.Thread(target=lambda: contents.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(b"x" * 100_000, tmp_path / "pipe")
    reader.join()
    assert contents == [b"x" * 100_000]
    controller, terminal = os.openpty()
    write_whole(b"y", Path(os.ttyname(terminal)))
    assert os.read(controller, 10) == b"y"
    os.close(controller)
    os.close(terminal)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="names of descriptors")
@pytest.mark.parametrize("to_file", [True, False])
def test_stdout_is_written_directly_between_what_is_printed(tmp_path, to_file):
    code = "import sys; from pathlib import Path; from bnlab.atomic_file import write_whole\n"
    code += "print('first'); write_whole(b'second\\n', Path('/dev/stdout')); print('third')"
    command = [sys.executable, "-c", code]
    if to_file:
        with (tmp_path / "out").open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
        out = (tmp_path / "out").read_bytes()
    else:
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    lines = out.split()
    assert sorted(lines) == [b"first", b"second", b"third"]
    assert not to_file or lines == [b"first", b"second", b"third"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full")
def test_a_device_that_is_full():
    with pytest.raises(UnwritableFile, match="/dev/full: file must be writable, got: no space left on device"):
        write_whole(b"x", Path("/dev/full"))


@posix
def test_paths_that_lead_nowhere_are_refused_early(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "a")
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "a", "too many levels of symbolic links"),
        (tmp_path / "a" / "c", "too many levels of symbolic links"),
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "c", "no such file or directory"),
        (tmp_path / "dangling", "no such file or directory"),
        (tmp_path / "file" / "c", "not a directory"),
        (tmp_path / "c\0d", "embedded null byte"),
        (tmp_path / ("n" * 300), "file name too long"),
    ):
        assert refused(path) == f"{path}: file must be writable, got: {reason}."


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("step", ["_sync", "_keep_attributes"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error, step):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(atomic_file, step, fail)
    with pytest.raises(UnwritableFile if isinstance(error, OSError) else type(error)) as raised:
        write_whole(b"new", path)
    if isinstance(error, OSError):
        assert str(raised.value) == f"{path}: file must be writable, got: no space left on device."
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_afterwards(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(atomic_file, "_sync_folder", lambda folder: events.append(f"sync {folder.name}"))
    monkeypatch.setattr(atomic_file.os, "fsync", lambda _: events.append("sync"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("rename") or replace(*paths))
    write_whole(b"new", tmp_path / "a.txt")
    assert events == ["sync", "rename", f"sync {tmp_path.name}"]


@pytest.mark.skipif(os.name != "posix", reason="folders that can be opened")
def test_the_folder_is_synchronised(tmp_path, monkeypatch):
    kinds = []
    monkeypatch.setattr(atomic_file.os, "fsync", lambda number: kinds.append(stat.S_IFMT(os.fstat(number).st_mode)))
    write_whole(b"new", tmp_path / "a.txt")
    assert kinds == [stat.S_IFREG, stat.S_IFDIR]


def test_of_several_writers_the_last_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    commands = ([sys.executable, "-c", WRITER, str(path), letter] for letter in "abc")
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert content in {letter * 100_000 for letter in (b"a", b"b", b"c")}
            seen.add(content[:1])
    assert [writer.communicate()[1] for writer in writers] == [b""] * 3
    assert seen
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
