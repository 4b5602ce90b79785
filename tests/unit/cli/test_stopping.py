import os
import signal
import subprocess
import sys

import pytest
from tests.unit.report.html_samples import receipt

from bnlab.cli.stopping import Stopped, stops_on_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

WRITES = """
import os, sys
from bnlab import atomic_file
from bnlab.cli import stopping

def wait():
    os.read(0, 1)

{before}

def sync(_):
    os.write(1, b"writing\\n")
    wait()

atomic_file._sync = sync
sys.argv = ["bnlab", "report", "receipt.json", "--output", "out.txt"]
from bnlab.cli.main import main
main()
"""
"""A command that waits while it writes its output."""

TORCH = """
import torch

def wait():
    while True:
        torch.ones(1000).exp().sum().item()
"""

HELPER = """
import threading
threading.Thread(target=threading.Event().wait).start()
"""

NATIVE = """
import ctypes
stopping._PATIENCE = 0.2

def wait():
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)
    lock(mutex)
    lock(mutex)  # which no signal ends
"""

SWALLOWS = """
stopping._PATIENCE = 0.2

def wait():
    while True:
        try:
            os.read(0, 1)
        except:
            pass
"""

FORKS = """
import os, signal, sys, time
from bnlab.cli import stopping
stopping._PATIENCE = 0.1

with stopping.stops_on_signals():
    process = os.fork()
    if process == 0:
        print("ready", flush=True)
        time.sleep(60)
        os._exit(3)
    sys.stdin.readline()
    os.kill(process, signal.SIGTERM)
    _, status = os.waitpid(process, 0)
    time.sleep(0.3)
print(os.WTERMSIG(status))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "receipt.json").write_text(receipt().dumps())
    (tmp_path / "out.txt").write_text("old")
    return tmp_path


def start(folder, before="", *, ignores=""):
    """Start the command, which inherits that it ignores the signals in `ignores`, and wait until it writes."""
    command = [sys.executable, "-c", WRITES.format(before=before)]
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' {ignores}; exec \"$@\"", "sh", *command] if ignores else command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"writing\n"
    assert len(list(folder.glob(".out.txt.*"))) == 1
    return process


def ended(process, *numbers):
    """Send signals and return the exit code and stderr of the process."""
    try:
        for number in numbers:
            process.send_signal(number)
        return process.wait(120), process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def assert_as_before(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["out.txt", "receipt.json"]
    assert (folder / "out.txt").read_text() == "old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_no_temporary_file(folder, number):
    message = b"bnlab: interrupted\n" if number == signal.SIGINT else b""
    assert ended(start(folder), number) == (128 + number, message)
    assert_as_before(folder)


def test_two_signals_at_once_are_one(folder):
    code, err = ended(start(folder), signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
    assert code in {128 + signal.SIGTERM, 128 + signal.SIGHUP}
    assert err == b""
    assert_as_before(folder)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(TORCH, id="torch"),
        pytest.param(HELPER, id="helper", marks=pytest.mark.slow),
        pytest.param(NATIVE, id="native"),
        pytest.param(SWALLOWS, id="swallows", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_command_whatever_runs(folder, before):
    assert ended(start(folder, before), signal.SIGTERM) == (128 + signal.SIGTERM, b"")
    assert_as_before(folder)


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_a_signal_that_the_caller_ignores_stays_ignored(folder, name):
    """As behind nohup, and as SIGINT in a job that a script starts in the background."""
    process = start(folder, ignores=name)
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.stdin.write(b"1")
    process.stdin.flush()
    assert ended(process) == (0, b"")
    assert (folder / "out.txt").read_text() != "old"


def test_what_a_killed_command_left_is_removed_by_the_next_one(folder):
    assert ended(start(folder), signal.SIGKILL) == (-signal.SIGKILL, b"")
    assert len(list(folder.iterdir())) == 3
    process = start(folder)
    process.stdin.write(b"1")
    process.stdin.flush()
    assert ended(process) == (0, b"")
    assert sorted(path.name for path in folder.iterdir()) == ["out.txt", "receipt.json"]
    assert (folder / "out.txt").read_text() != "old"


def test_a_forked_process_ends_alone():
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        out, _ = process.communicate("\n")
    assert (process.returncode, out) == (0, f"{int(signal.SIGTERM)}\n")


def test_handlers_are_those_of_the_caller_again():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, stops_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before

    def own(*_):
        numbers.append(1)

    numbers = []
    signal.signal(signal.SIGTERM, own)
    try:
        with stops_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert numbers == [1]


def test_an_event_loop_keeps_its_wakeups():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with stops_on_signals():
            pass
        assert signal.set_wakeup_fd(before) == writer
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
