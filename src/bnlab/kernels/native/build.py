"""Compiles the kernels: ``python -m bnlab.kernels.native.build``.

Each set of instructions is a build of the same source; the processor picks one when the library is loaded. The library
is bound to no version of Python and to torch from 2.10 on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bnlab.kernels.native._library import LIBRARY

__all__ = ["BUILDS", "SOURCES", "build", "compiler", "main"]

SOURCES = Path(__file__).with_name("src")
BUILDS = {
    "avx512": ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"],
    "baseline": ["-O2"],
}
"""Compiler flags of every set of instructions."""

_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
_OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_TORCH = Path(torch.__file__).parent


def compiler() -> str | None:
    """Return the C++ compiler: $CXX, or the first that is found; None if there is none."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def build(output: Path = LIBRARY) -> None:
    """Compile and link the library; it is there whole or not at all.

    Raises:
        RuntimeError: If there is no compiler, or it refuses.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or set CXX")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        objects = _compiled(cxx, Path(folder))
        library = Path(folder, output.name)
        _run(
            [
                cxx,
                "-shared",
                *map(str, objects),
                f"-L{_TORCH / 'lib'}",
                "-ltorch_cpu",
                "-ltorch",
                "-lc10",
                "-o",
                str(library),
            ]
        )
        library.replace(output)


def _compiled(cxx: str, folder: Path) -> list[Path]:
    names = list(BUILDS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    jobs = [(folder / f"{name}.o", "kernels.cpp", [f"-DBNLAB_ISA={name}", *BUILDS[name]]) for name in names]
    jobs.append((folder / "dispatch.o", "dispatch.cpp", []))
    jobs.append((folder / "shim.o", "torch_shim.cpp", [_OLDEST_TORCH, "-isystem", str(_TORCH / "include")]))

    def compiled(job: tuple[Path, str, Sequence[str]]) -> Path:
        output, source, flags = job
        _run([cxx, *_FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(output)])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, jobs))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} refused: {done.stderr.strip() or done.returncode}")


def main() -> int:
    """Build, or say on stderr why not: bnlab then runs on torch's kernels, more slowly."""
    try:
        build()
    except (RuntimeError, OSError) as error:
        print(f"native kernels are not built: {error}", file=sys.stderr)
        return 1
    print(f"built {LIBRARY.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
