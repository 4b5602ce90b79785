"""Builds the C entry points with the address sanitizer and runs them on odd shapes: python tests/native/run.py.

It runs the best build for this processor, the plainest build, and the AVX-512 build, whose instructions are emulated if
the processor lacks them. The last line of each run is its result.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bnlab.kernels.native.build import PARTS, SETS, SOURCES, compiler

FLAGS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi"]
STREAM_BYTES = 16384
"""Outputs of at least this size bypass the cache here, which allows small tensors in tests of both paths."""


def main() -> int:
    """Build and run. Return 0 if every case passed, or if there is no compiler."""
    cxx = compiler()
    if cxx is None:
        print("native: 0 passed, 0 failed, 1 skipped")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = build(cxx, Path(folder))
        return max(run(program, name) for name in builds())


def builds() -> list[str]:
    """Return the builds that can run here, emulated or not."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["baseline"]
    if has("avx512bw"):
        return ["avx512", "baseline"]
    return ["avx512", "avx2", "baseline"] if has("avx2") else ["baseline"]


def has(instructions: str) -> bool:
    """Whether this processor has a set of instructions."""
    known = Path("/proc/cpuinfo")
    return known.exists() and instructions in known.read_text(encoding="utf-8")


def build(cxx: str, folder: Path) -> Path:
    """Compile the kernels and the test program."""
    program = folder / "odd_shapes"
    stream = f"-DBNLAB_STREAM_BYTES={STREAM_BYTES}"
    jobs = [
        (f"{name}-{part}.o", SOURCES / part, [f"-DBNLAB_ISA={name}", stream, *machine_flags(name)])
        for part in PARTS
        for name in builds()
    ]
    linked = [f"-DBNLAB_WITH_{name.upper()}" for name in builds()]
    # The processor does not report emulated instructions.
    emulated = [] if has("avx512bw") else ["-D__builtin_cpu_supports(name)=true"]
    jobs.append(("dispatch.o", SOURCES / "dispatch.cpp", [*linked, *emulated]))
    jobs.append(("odd_shapes.o", Path(__file__).with_name("odd_shapes.cpp"), [f"-I{SOURCES}"]))

    def compiled(job: tuple[str, Path, list[str]]) -> str:
        output, source, flags = job
        subprocess.run([cxx, *FLAGS, *flags, "-c", str(source), "-o", str(folder / output)], check=True)
        return str(folder / output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, jobs))
    subprocess.run([cxx, *FLAGS, *objects, "-o", str(program)], check=True)
    return program


def machine_flags(name: str) -> list[str]:
    """Return the compiler flags for a set of instructions, without optimizer flags."""
    if name == "avx512" and not has("avx512bw"):
        return [f"-I{Path(__file__).with_name('emulated')}", *machine_flags("avx2")]
    return [flag for flag in SETS[name] if not flag.startswith("-O")]


def run(program: Path, name: str) -> int:
    """Run the program with one build. It prints the number of passed cases."""
    environment = {**os.environ, "BNLAB_ISA": name}
    return subprocess.run([str(program)], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
