"""Measures BN + ReLU, forward and backward, in float32 and channels_last: bnlab's layer against oneDNN's primitive.

oneDNN is not a dependency: pip install --no-deps onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0. The calls
of oneDNN get allocated outputs, while bnlab allocates its own. The two alternate, and each timed call follows an
untimed call of the same library. The table shows medians.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bnlab
from bnlab.kernels.native.build import compiler

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.resnet50 import BN_ACTIVATIONS
from benchmarks.measuring.steps import forward_and_backward
from benchmarks.measuring.timing import alternating, geometric_mean, medians, restart_with, wall

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "1073741824",
    "OMP_PROC_BIND": "true",
}


def main() -> None:
    """Measure and print. The last line is the main result."""
    restart_with(ENVIRONMENT, __file__)
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
        for channels, side in BN_ACTIVATIONS:
            shape = (32, channels, side, side)
            bnlab_ms, onednn_ms, difference = compare(peer, shape, options.repetitions)
            ratios.append(onednn_ms / bnlab_ms)
            table.add_row(
                str(shape), f"{bnlab_ms:.2f}", f"{onednn_ms:.2f}", f"{onednn_ms / bnlab_ms:.2f}", f"{difference:.1e}"
            )
    console = Console(width=100)
    console.print(table)
    console.print(f"time of oneDNN / bnlab: {geometric_mean(ratios):.2f} (from {min(ratios):.2f})")


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
    x.requires_grad_()
    step = forward_and_backward(layer, x, None, dy, list(layer.parameters()))
    readings = {"bnlab": wall(step), "oneDNN": wall(lambda: peer.peer_step(handle))}
    seconds = medians(alternating(readings, repetitions))
    difference = float((torch.autograd.grad(layer(x), x, dy)[0] - dx).abs().max())
    peer.peer_delete(handle)
    return 1e3 * seconds["bnlab"], 1e3 * seconds["oneDNN"], difference


if __name__ == "__main__":
    main()
