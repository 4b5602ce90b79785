"""Runs commands of bnlab in child processes, and measures their time and peak memory.

The launcher is a small process of its own, because a child starts with the peak memory of the process that starts it.
It reads one request a line from stdin and writes one answer a line to stdout, both as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

ADDRESS_SPACE = 6 << 30
"""What a child may map, so that no file takes the machine."""
PROCESSOR_SECONDS = 25
"""What a child may compute, however busy the machine is."""


def main() -> None:
    """Answer requests until stdin ends. The argument `imported` makes children of `fork` cheap: they import nothing."""
    if "imported" in sys.argv:
        _import()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(run(**request)) + "\n")
        answers.flush()


def _import() -> None:
    """Import what the commands import, each when it is needed."""
    import bnlab.cli.main
    import bnlab.cli.specs
    import bnlab.diagnosis.check
    import bnlab.observe.files.load
    import bnlab.remedies.fold_onnx.fold_onnx
    import bnlab.repairing  # noqa: F401

    with suppress(ImportError):
        import h5py  # noqa: F401
        import onnx.reference  # noqa: F401


def run(arguments: list[str], folder: str, limit: float, new_process: bool) -> dict[str, Any]:
    """Run one command, and kill it at the limit of seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(arguments, folder, out.fileno(), err.fileno(), new_process)
        status, usage, killed = _wait(child, start + limit)
        seconds = time.monotonic() - start
        err.seek(0)
        return {
            "seconds": seconds,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
            "megabytes": usage.ru_maxrss / 1024,
            "code": None
            if killed or os.waitstatus_to_exitcode(status) in _KILLED
            else os.waitstatus_to_exitcode(status),
            "stderr": err.read(100_000).decode(errors="replace"),
        }


_KILLED = (-signal.SIGKILL, -signal.SIGXCPU)


def _wait(child: int, until: float) -> tuple[int, resource.struct_rusage, bool]:
    while time.monotonic() < until:
        process, status, usage = os.wait4(child, os.WNOHANG)
        if process:
            return status, usage, False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage, True


def _become(arguments: list[str], folder: str, out: int, err: int, new_process: bool) -> NoReturn:
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(folder)
        if new_process:
            os.execv(sys.executable, [sys.executable, "-m", "bnlab", *arguments])
        code = _called(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _called(arguments: list[str]) -> int:
    """Run the command in this process, which has imported it."""
    from bnlab.cli.main import main as command

    sys.argv = ["bnlab", *arguments]
    try:
        command()
    except SystemExit as end:
        with suppress(OSError):
            sys.stdout.flush()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
