"""Compiles the kernels: ``python -m bnlab.kernels.native.build``, with ``--all`` for every set of instructions.

Each set of instructions is a build of the same source. The library picks the best one for the processor when it is
loaded. It works with any version of Python and with torch from 2.10 on, and compiling it does not need torch. This file
imports the standard library only, because the hook that builds a wheel loads it on its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PARTS", "SETS", "SOURCES", "build", "compiler", "machine_set", "main", "wanted_sets"]

SOURCES = Path(__file__).with_name("src")
SETS = {
    "avx512": ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"],
    "baseline": ["-O2"],
}
"""Compiler flags of every set of instructions, the best first."""

PARTS = ("backward.cpp", "forward.cpp", "statistics.cpp")
"""The files that are compiled for every set. Those that take longest come first."""

_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
_NEEDED_MACROS = {
    "avx512": {"__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__", "__AVX2__", "__FMA__", "__F16C__"},
    "avx2": {"__AVX2__", "__FMA__", "__F16C__"},
}

Report = Callable[[str], object]


@dataclass(frozen=True)
class _Job:
    """One call of the compiler."""

    output: Path
    source: str
    flags: Sequence[str]


def compiler() -> str | None:
    """Return the first C++ compiler of $CXX, g++ and clang++ that is installed, or None."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def machine_set(cxx: str) -> str:
    """Return the best set of instructions that this processor and the compiler support."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "baseline"
    list_macros = [cxx, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    answer = subprocess.run(list_macros, capture_output=True, text=True, check=False).stdout
    macros = {line.split()[1] for line in answer.splitlines() if line.startswith("#define ")}
    return next((name for name, needed in _NEEDED_MACROS.items() if needed <= macros), "baseline")


def wanted_sets(cxx: str, *, every: bool) -> tuple[str, ...]:
    """Return the sets to compile: every set for this kind of processor, or the set of this machine."""
    if not every:
        return (machine_set(cxx),)
    return tuple(SETS) if platform.machine() in ("x86_64", "AMD64") else ("baseline",)


def build(output: Path, *, every: bool, report: Report) -> tuple[str, ...]:
    """Compile and link the library, and return the sets of instructions in it. A failed build leaves no partial file.

    Args:
        output: The path of the library.
        every: Whether to compile all sets of instructions, for other machines, or only that of this machine.
        report: A function that is called with a line about each compiled file.

    Raises:
        RuntimeError: If there is no compiler, or if it fails.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("there is no C++ compiler: install g++ or clang++, or set CXX")
    sets = wanted_sets(cxx, every=every)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        objects = _compiled(cxx, _jobs(Path(folder), sets), f"compiling kernels for {' and '.join(sets)}", report)
        library = Path(folder, output.name)
        _run([cxx, "-shared", *map(str, objects), *_torch_library(cxx, Path(folder)), "-o", str(library)])
        library.replace(output)
    return sets


def _jobs(folder: Path, sets: Iterable[str]) -> list[_Job]:
    jobs = [
        _Job(folder / f"{name}-{part}.o", part, [f"-DBNLAB_ISA={name}", *SETS[name]]) for part in PARTS for name in sets
    ]
    linked = [f"-DBNLAB_WITH_{name.upper()}" for name in sets]
    jobs.append(_Job(folder / "torch_shim.o", "torch_shim.cpp", []))
    jobs.append(_Job(folder / "dispatch.o", "dispatch.cpp", linked))
    return jobs


def _compiled(cxx: str, jobs: Sequence[_Job], title: str, report: Report) -> list[Path]:
    """Compile in parallel. Return the objects in the order in which they must be linked."""
    report(f"{title}: {len(jobs)} files")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [
            pool.submit(_run, [cxx, *_FLAGS, *job.flags, "-c", str(SOURCES / job.source), "-o", str(job.output)])
            for job in jobs
        ]
        try:
            for count, done in enumerate(as_completed(running), start=1):
                done.result()
                report(f"{title}: {count} of {len(jobs)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _plainest_first([job.output for job in jobs])


def _plainest_first(objects: Sequence[Path]) -> list[Path]:
    """Return the objects with the plainest set of instructions first.

    Several objects contain the same functions of the standard library, and the linker keeps the first copy. The other
    builds must not call a copy that was compiled for AVX-512.
    """
    ranks = {name: rank for rank, name in enumerate(SETS, start=1)}
    return sorted(objects, key=lambda path: -ranks.get(path.name.partition("-")[0], len(ranks) + 1))


def _torch_library(cxx: str, folder: Path) -> list[str]:
    """Return the flags that link against torch. An empty library of the same name stands in for torch's.

    torch need not be installed. At run time torch has already loaded its own library, and the loader matches the name.
    """
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    source, stand_in = folder / "nothing.cpp", folder / "libtorch_cpu.so"
    source.touch()
    _run([cxx, "-shared", "-fPIC", str(source), f"-Wl,-soname,{stand_in.name}", "-o", str(stand_in)])
    return ["-Wl,--no-as-needed", str(stand_in), "-Wl,--as-needed"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the library, or report on stderr why that fails. bnlab then runs on torch's slower kernels."""
    parser = argparse.ArgumentParser(prog="python -m bnlab.kernels.native.build", description="Compile the kernels.")
    parser.add_argument(
        "--all", action="store_true", help="compile every set of instructions, not only that of this machine"
    )
    options = parser.parse_args(arguments)
    from bnlab.kernels.native.library import LIBRARY  # the package needs torch, and compiling does not

    try:
        sets = build(LIBRARY, every=options.all, report=lambda line: print(line, file=sys.stderr, flush=True))
    except (RuntimeError, OSError) as error:
        print(f"The native kernels are not built: {error}", file=sys.stderr)
        return 1
    print(f"built {LIBRARY.name} for {' and '.join(sets)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
