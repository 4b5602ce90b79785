"""The record of a run, which becomes a JSON file: where it ran, with what, and every figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bnlab
from bnlab.atomic_file import write_whole

__all__ = ["RESULTS", "Record", "default_path", "new_record"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_SECONDS = 10
"""The longest wait for a program that tells a version."""


@dataclass
class Record:
    """What a run writes.

    Attributes:
        date: The start of the run, in UTC.
        is_dry: Whether this is a dry run, whose times say nothing about a GPU.
        device: Name, memory in bytes and further properties of the device.
        versions: The versions of everything that the figures depend on.
        commit: The commit of the checkout; None if git does not tell.
        has_changes: Whether tracked files of the checkout differ from the commit.
        settings: The options and the sizes.
        bandwidth: Bytes per second of a copy, read and written together; None before it is measured.
        sections: The rows of each section. Times are in seconds.
        failures: The sides that have no figures, with the reason.
        left_out: The rows that the time did not suffice for.
        headline: The main results, each with its bar.
        seconds: The wall seconds of the run.
    """

    date: str
    is_dry: bool
    device: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    has_changes: bool | None
    settings: dict[str, Any]
    bandwidth: float | None = None
    sections: dict[str, list[Any]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    headline: list[Any] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, section: str, row: Any) -> None:  # noqa: ANN401 - each section has rows of its own
        """Add a row, which is a dataclass, to a section."""
        self.sections.setdefault(section, []).append(row)

    def rows(self, *sections: str) -> list[Any]:
        """Return the rows of sections."""
        return [row for section in sections for row in self.sections.get(section, [])]

    def write(self, path: Path) -> None:
        """Write the record. The file is whole after every call."""
        document = {"benchmark": "gpu", **dataclasses.asdict(self)}
        text = json.dumps(_plain(document), indent=1, allow_nan=False)
        write_whole(f"{text}\n".encode(), path)


def new_record(settings: dict[str, Any], device: torch.device, *, is_dry: bool) -> Record:
    """Return a record without figures."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return Record(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        is_dry=is_dry,
        device=_device(device),
        versions=_versions(),
        commit=commit or None,
        has_changes=None if changes is None else bool(changes),
        settings=settings,
    )


def default_path(record: Record) -> Path:
    """Return the path of a record under benchmarks/results, such as gpu-nvidia-h100-80gb-hbm3-2026-11-28.json."""
    device = re.sub(r"[^a-z0-9]+", "-", str(record.device["name"]).lower()).strip("-")
    return RESULTS / f"gpu-{device}-{record.date[:10]}.json"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": platform.processor() or platform.machine(), "type": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    names = ("total_memory", "multi_processor_count", "major", "minor", "L2_cache_size", "gcnArchName")
    facts = {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    which = f"--id=GPU-{getattr(properties, 'uuid', '')}"
    limits = _output("nvidia-smi", which, "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", _PLAIN)
    return {"name": properties.name, "type": device.type, **facts, "max_clocks_and_power_limit": limits}


_PLAIN = "--format=csv,noheader"


def _versions() -> dict[str, str | None]:
    return {
        "bnlab": bnlab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "cudnn": _cudnn(),
        "driver": (_output("nvidia-smi", "--query-gpu=driver_version", _PLAIN) or "").split("\n")[0] or None,
        "system": platform.platform(),
        "processors": str(os.cpu_count()),
    }


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if version is None else str(version)


def _triton() -> str | None:
    """Return the version of triton without importing it; torch for ROCm and Intel bring it under other names."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it is not there or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return done.stdout.strip()
    return None


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a JSON value in which numbers that are not finite are their names, as in every file of bnlab."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
