"""Measures BN + ReLU, forward and backward, in float32 and channels_last: bnlab's layer against oneDNN's primitive.

oneDNN is not a dependency: pip install --no-deps onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0. The calls
of oneDNN get allocated outputs, while bnlab allocates its own. The two alternate, and each timed call follows an
untimed call of the same library. The table shows medians.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bnlab
from bnlab.kernels.native.build import compiler

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "1073741824",
    "OMP_PROC_BIND": "true",
}
SHAPES = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))


def main() -> None:
    """Measure and print. The last line is the main result."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], {**os.environ, **ENVIRONMENT})
    parser = argparse.ArgumentParser(prog="bnlab bench onednn", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--prefix", type=Path, default=Path(sys.prefix), help="where oneDNN is installed")
    options = parser.parse_args()
    torch.set_num_threads(2)
    table = Table(title="BN + ReLU, forward + backward, float32, channels last, 2 threads", box=None)
    for name in ("shape", "bnlab, ms", "oneDNN, ms", "oneDNN / bnlab", "largest difference"):
        table.add_column(name, justify="left" if name == "shape" else "right")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        peer = load(options.prefix, Path(folder))
        for channels, side in SHAPES:
            shape = (32, channels, side, side)
            bnlab_ms, onednn_ms, difference = compare(peer, shape, options.repetitions)
            ratios.append(onednn_ms / bnlab_ms)
            table.add_row(
                str(shape), f"{bnlab_ms:.2f}", f"{onednn_ms:.2f}", f"{onednn_ms / bnlab_ms:.2f}", f"{difference:.1e}"
            )
    console = Console(width=100)
    console.print(table)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    console.print(f"time of oneDNN / bnlab: {mean:.2f} (from {min(ratios):.2f})")


def load(prefix: Path, folder: Path) -> ctypes.CDLL:
    """Compile the program around oneDNN and load it."""
    cxx, source, output = compiler(), Path(__file__).with_name("onednn") / "peer.cpp", folder / "peer.so"
    if cxx is None or not (prefix / "include/oneapi/dnnl/dnnl.hpp").exists():
        sys.exit("onednn: a compiler and oneDNN must be installed, got one or none. See --help.")
    where = [f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}", f"-Wl,-rpath,{prefix / 'lib'}"]
    subprocess.run(
        [cxx, "-std=c++17", "-O2", "-shared", "-fPIC", *where, str(source), "-ldnnl", "-o", str(output)], check=True
    )
    library = ctypes.CDLL(str(output))
    library.peer_new.restype = ctypes.c_void_p
    library.peer_new.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 6
    library.peer_step.argtypes = library.peer_delete.argtypes = [ctypes.c_void_p]
    return library


def compare(peer: ctypes.CDLL, shape: tuple[int, ...], repetitions: int) -> tuple[float, float, float]:
    """Return the median milliseconds of both libraries, and the largest difference of their dx."""
    x, dy = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    layer = bnlab.nn.BatchNorm2d(shape[1], activation="relu")
    y, dx = torch.empty_like(x), torch.empty_like(x)
    scale, shift = layer.weight.detach().clone(), layer.bias.detach().clone()
    handle = peer.peer_new(*shape, *(tensor.data_ptr() for tensor in (x, dy, scale, shift, y, dx)))
    inputs = [x.requires_grad_(), *layer.parameters()]
    sides = (lambda: torch.autograd.grad(layer(x), inputs, dy), lambda: peer.peer_step(handle))
    times: list[list[float]] = [[], []]
    for _ in range(repetitions):
        for side, step in zip(times, sides, strict=True):
            step()  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            step()  # type: ignore[no-untyped-call]
            side.append(1e3 * (time.perf_counter() - start))
    difference = float((sides[0]()[0] - dx).abs().max())
    peer.peer_delete(handle)
    bnlab_ms, onednn_ms = (statistics.median(side) for side in times)
    return bnlab_ms, onednn_ms, difference


if __name__ == "__main__":
    main()
