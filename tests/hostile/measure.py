"""Measures what a hostile file costs, above the same command on an honest one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.case import Case
from tests.hostile.onnx_files import honest
from tests.hostile.zips import MEMBERS, written
from typing_extensions import Self

__all__ = ["LIMIT", "MEGABYTES", "SECONDS", "Cost", "Meter"]

_MEASURED = ("seconds", "processor_seconds", "megabytes")
SECONDS, MEGABYTES, LIMIT = 5.0, 300.0, 20.0
"""What a hostile file may cost above an honest one, and when a command is killed."""


@dataclass(frozen=True)
class Cost:
    """What one command cost above the same command on an honest file.

    Attributes:
        case: The hostile file.
        command: The command.
        seconds: Wall time.
        processor_seconds: Time of the processor, which a busy machine does not change.
        megabytes: Peak of the resident memory.
        code: The exit code; None if the command was killed.
        stderr: What the command wrote there.
    """

    case: Case
    command: str
    seconds: float
    processor_seconds: float
    megabytes: float
    code: int | None
    stderr: str

    def complaint(self, *, busy: bool = False, tolerance: float = 1.0) -> str | None:
        """Return the first rule that the command broke, or None.

        Args:
            busy: Judge the time of the processor: the machine does other things too.
            tolerance: How many times the allowed seconds may pass.
        """
        lines = self.stderr.strip().splitlines()
        seconds = self.processor_seconds if busy else self.seconds
        if self.code is None:
            return f"hangs: killed after {self.seconds:.0f} s, of which it computed {self.processor_seconds:.0f} s"
        if self.code < 0:
            return f"dies of signal {-self.code}"
        if any(line.startswith("Traceback") for line in lines):
            return f"traceback: {lines[-1][:200]}"
        if self.code not in self.case.codes:
            return f"exit code {self.code}, not {' or '.join(map(str, self.case.codes))}"
        if self.code == 2 and len(lines) != 1 and "{dir}/**" not in self.command:
            return f"{len(lines)} lines on stderr"
        if seconds > SECONDS * tolerance:
            return f"takes {seconds:.1f} s"
        if self.megabytes > MEGABYTES:
            return f"takes {self.megabytes:.0f} MB"
        return None


@dataclass
class Meter:
    """Runs commands through a launcher.

    Attributes:
        folder: A folder for files.
        new_process: Run every command in a process of its own, as a user does, even where a copy of one that has
            imported everything would do.
        source: The folder of the package to measure; None for the one that is installed.
        limit: The seconds after which a command is killed.
    """

    folder: Path
    new_process: bool = False
    source: Path | None = None
    limit: float = LIMIT
    _launcher: subprocess.Popen[str] | None = None
    _honest: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Start the launcher."""
        paths = [str(self.source)] if self.source else []
        paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self._launcher = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launcher.py")), *([] if self.new_process else ["imported"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the launcher."""
        if self._launcher is not None:
            assert self._launcher.stdin is not None
            assert self._launcher.stdout is not None
            self._launcher.stdin.close()
            self._launcher.wait()
            self._launcher.stdout.close()

    def costs(self, case: Case, folder: Path) -> Iterator[Cost]:
        """Build the file in an empty folder, and yield what each command on it costs."""
        path = case.build(folder)
        for command in case.commands:
            typical = self._honest_cost(command, case.kind)
            answer = self._run(command, path, folder)
            seconds, processor_seconds, megabytes = (max(0.0, answer[name] - typical[name]) for name in _MEASURED)
            yield Cost(case, command, seconds, processor_seconds, megabytes, answer["code"], answer["stderr"])

    def _honest_cost(self, command: str, kind: str) -> dict[str, float]:
        """Return the measurements of a command on a small honest file: the median of three runs."""
        if (command, kind) not in self._honest:
            with _fresh(self.folder / "honest") as folder:
                (folder / "code.py").write_text(
                    "from torch import nn\n\n\ndef build():\n    return nn.BatchNorm1d(1)\n"
                )
                path = honest(folder) if kind == "onnx" else written(folder, MEMBERS)
                answers = [self._run(command, path, folder) for _ in range(3)]
            medians = {name: statistics.median(answer[name] for answer in answers) for name in _MEASURED}
            self._honest[command, kind] = medians
        return self._honest[command, kind]

    def _run(self, command: str, path: Path, folder: Path) -> dict[str, Any]:
        assert self._launcher is not None
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        words = [word.replace("{dir}", str(folder)).replace("{}", str(path)) for word in shlex.split(command)]
        request = {
            "arguments": words,
            "folder": str(folder),
            "limit": self.limit,
            "new_process": self.new_process,
        }
        self._launcher.stdin.write(json.dumps(request) + "\n")
        self._launcher.stdin.flush()
        answer: dict[str, Any] = json.loads(self._launcher.stdout.readline())
        return answer


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
