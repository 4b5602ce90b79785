import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnlab import partial_file
from bnlab.partial_file import partial_path, remove_stale, writing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")

WRITER = """
import sys
from pathlib import Path
from bnlab.partial_file import partial_path, writing

path = partial_path(Path(sys.argv[1]))
with writing(path, 0o600):
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is writing a.txt, and the path of its temporary file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_path_is_beside_the_target_and_used_once(tmp_path):
    target = tmp_path / ("ñ" * 127)  # the longest name
    first, second = partial_path(target), partial_path(target)
    assert first != second
    assert first.parent == tmp_path
    assert f"-{os.getpid()}-" in first.name
    with writing(first, 0o600) as file:
        file.write(b"1")
    assert first.read_bytes() == b"1"


def test_a_file_that_another_process_writes_is_not_touched(tmp_path, writer):
    _, path = writer
    remove_stale(tmp_path)
    assert path.exists()


def test_a_file_that_a_killed_process_left_is_removed(tmp_path, writer):
    process, path = writer
    process.kill()
    process.wait()
    assert path.exists()
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_locked_file_is_not_touched_though_its_process_seems_to_be_gone(tmp_path, writer, monkeypatch):
    """As seen from another container, where the processes have other numbers."""
    _, path = writer
    monkeypatch.setattr(partial_file, "_is_gone", lambda *_: True)
    remove_stale(tmp_path)
    assert path.exists()


def test_a_file_without_a_lock_is_not_touched_while_its_process_runs(tmp_path):
    """Such as one that is created this moment."""
    path = partial_path(tmp_path / "a.txt")
    path.touch()
    remove_stale(tmp_path)
    assert path.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux says when a process started")
def test_a_number_that_stands_for_another_process_by_now(tmp_path):
    path = partial_path(tmp_path / "a.txt")
    machine, process, start, token = path.name.removesuffix(".bnlab-partial").rpartition(".")[2].split("-")
    stale = path.with_name(f".a.txt.{machine}-{process}-{int(start) - 1}-{token}.bnlab-partial")
    stale.touch()
    remove_stale(tmp_path)
    assert not stale.exists()


@pytest.mark.parametrize(
    "name",
    [
        ".a.txt.{other}-{gone}-1-00ff.bnlab-partial",  # of another machine
        "a.txt.{machine}-{gone}-1-00ff.bnlab-partial",
        ".a.txt.{machine}-{gone}-1-00ff.bnlab-partial.txt",
        ".a.txt.{machine}-{gone}-00ff.bnlab-partial",
        ".a.txt.{machine}-{huge}-1-00ff.bnlab-partial",
        ".a.txt.{machine}-0-1-00ff.bnlab-partial",
    ],
)
def test_other_files_are_not_touched(tmp_path, name):
    machine = partial_file._machine()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    path = tmp_path / name.format(machine=machine, other=machine[::-1], gone=process.pid, huge="9" * 30)
    path.touch()
    remove_stale(tmp_path)
    assert path.exists()


def test_what_is_no_file_is_not_touched(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    path = tmp_path / f".a.txt.{partial_file._machine()}-{process.pid}-1-00ff.bnlab-partial"
    os.mkfifo(path)
    remove_stale(tmp_path)
    assert path.exists()
    remove_stale(tmp_path / "none")
