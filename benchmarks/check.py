"""Measures the time and memory of `bnlab check` against torch.load and safetensors.

The benchmark answers three questions. How much does the check of a 2 GB checkpoint cost after all imports? How long
does the command take on a 4 MB file, compared with `import torch` alone? How long do 1,000 small files take in one
call?

Each reading runs in its own process, after its imports. The time is that of one call. The memory is the rise of the
peak resident set (VmHWM, which is reset before the call). The contenders alternate, and the tables show medians. The
file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SETUP = {
    "bnlab.check": "import bnlab; call = bnlab.check",
    "torch.load": "import torch; call = torch.load",
    "torch.load mmap": "import torch, functools; call = functools.partial(torch.load, mmap=True)",
    "load_file": "import safetensors.torch; call = safetensors.torch.load_file",
    "load_file, read": (
        "import safetensors.torch\n"
        "def call(path): return {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}"
    ),
}
CHILD = """
import json, sys, time
{setup}
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
call({warm_up!r})
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, start = peak(), time.perf_counter()
value = call({path!r})
print(json.dumps([time.perf_counter() - start, (peak() - before) / 1024]))
"""


def main() -> None:
    """Run the benchmark and print its tables. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench check", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the large checkpoint")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--files", type=int, default=1000, help="number of small checkpoints")
    options = parser.parse_args()
    console = Console(width=100)
    console.print(f"{platform.machine()}, Python {platform.python_version()}, medians of {options.repetitions}\n")
    with tempfile.TemporaryDirectory() as folder:
        headline = large_file(Path(folder), options.gigabytes, options.repetitions, console)
        start_up(Path(folder), options.repetitions, console)
        many_files(Path(folder), options.files, console)
    console.print(headline)


def large_file(folder: Path, gigabytes: float, repetitions: int, console: Console) -> str:
    """Compare a check with loading the same file."""
    layers = write_large(folder, int(gigabytes * 1e9))
    contenders = [
        ("bnlab.check", "large.pt"),
        ("torch.load", "large.pt"),
        ("torch.load mmap", "large.pt"),
        ("bnlab.check", "large.safetensors"),
        ("load_file", "large.safetensors"),
        ("load_file, read", "large.safetensors"),
    ]
    readings: dict[tuple[str, str], list[tuple[float, float]]] = {contender: [] for contender in contenders}
    for _ in range(repetitions):
        for name, file in contenders:
            readings[name, file].append(measure(name, folder / file, folder / f"warm_up{Path(file).suffix}"))
    table = Table(title=f"a checkpoint of {gigabytes:g} GB with {layers} BN layers, after import", title_justify="left")
    for header in ("file", "call", "time", "peak rise", "time of bnlab / this", "peak of bnlab / this"):
        table.add_column(header, justify="left" if header in ("file", "call") else "right")
    medians = {key: tuple(map(statistics.median, zip(*rows, strict=True))) for key, rows in readings.items()}
    for (name, file), (seconds, megabytes) in medians.items():
        own = medians["bnlab.check", file]
        ratios = ("", "") if name == "bnlab.check" else (f"{own[0] / seconds:.4f}", f"{own[1] / megabytes:.4f}")
        table.add_row(file, name, f"{1e3 * seconds:.1f} ms", f"{megabytes:.1f} MB", *ratios)
    console.print(table)
    own, load = medians["bnlab.check", "large.pt"], medians["torch.load", "large.pt"]
    return (
        f"check of a {gigabytes:g} GB checkpoint: {own[0] / load[0]:.4f} of the time and {own[1] / load[1]:.4f} of the "
        "peak memory of torch.load"
    )


def write_large(folder: Path, size: int) -> int:
    """Write a ResNet-like state dict of about `size` bytes in both formats. Return its number of BN layers."""
    import torch
    from safetensors.torch import save_file

    state: dict[str, torch.Tensor] = {}
    written = layers = 0
    while written < size:
        channels = (64, 128, 256, 512, 1024, 2048)[layers % 6]
        weight = torch.randn(channels, min(channels, 1024), 3, 3)
        state[f"layer{layers}.conv.weight"] = weight
        state[f"layer{layers}.bn.weight"] = torch.ones(channels)
        state[f"layer{layers}.bn.bias"] = torch.zeros(channels)
        state[f"layer{layers}.bn.running_mean"] = torch.randn(channels)
        state[f"layer{layers}.bn.running_var"] = torch.rand(channels) + 0.5
        state[f"layer{layers}.bn.num_batches_tracked"] = torch.tensor(1000)
        written += weight.numel() * weight.element_size()
        layers += 1
    torch.save({"state_dict": state, "epoch": 90}, folder / "large.pt")
    save_file(state, folder / "large.safetensors")
    small = {key: value for key, value in state.items() if key.startswith("layer0.bn")}
    torch.save(small, folder / "warm_up.pt")
    save_file(small, folder / "warm_up.safetensors")
    return layers


def measure(name: str, path: Path, warm_up: Path) -> tuple[float, float]:
    """Return the seconds and megabytes of one call in a new process."""
    code = textwrap.dedent(CHILD).format(setup=SETUP[name], path=str(path), warm_up=str(warm_up))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout)
    return seconds, megabytes


def start_up(folder: Path, repetitions: int, console: Console) -> None:
    """Compare the whole command on a 4 MB file with importing torch."""
    path = folder / "four.pt"
    write_small(path, 4_000_000)
    commands = {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "bnlab check (4 MB)": [sys.executable, "-m", "bnlab", "check", str(path)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            seconds[name].append(timed(command))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["python -c 'import torch'"]
    table = Table(title="whole process", title_justify="left")
    for header in ("command", "time", "of import torch"):
        table.add_column(header, justify="left" if header == "command" else "right")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f} s", f"{value / base:.2f}")
    console.print(table)


def many_files(folder: Path, count: int, console: Console) -> None:
    """Time one call on many small files, without the start-up."""
    many = folder / "many"
    many.mkdir()
    for index in range(count):
        write_small(many / f"{index:04}.pt", 100_000)
    one = [sys.executable, "-m", "bnlab", "check", str(many / "0000.pt")]
    alone = timed(one)
    all_ = timed([*one[:-1], str(many)])
    console.print(f"{count} small checkpoints in one call: {1e3 * (all_ - alone) / count:.1f} ms each after start-up\n")


def write_small(path: Path, size: int) -> None:
    """Write a checkpoint of about `size` bytes with 20 BN layers."""
    import torch
    from torch import nn

    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm2d(16)) for _ in range(20)))
    for layer in model.modules():
        if (
            isinstance(layer, nn.BatchNorm2d)
            and layer.running_var is not None
            and layer.num_batches_tracked is not None
        ):
            layer.running_var.fill_(2)
            layer.num_batches_tracked.fill_(1000)
    torch.save({"state_dict": model.state_dict(), "rest": torch.zeros(size // 4)}, path)


def timed(command: list[str]) -> float:
    """Return the seconds that a process takes."""
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
