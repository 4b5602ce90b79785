"""Paths that are no regular files, and folders that have no end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.hostile.case import CODE, hostile
from tests.hostile.zips import MEMBERS, written


def pipe(folder: Path, name: str = "pipe.pt") -> Path:
    """Make a pipe without a writer."""
    path = folder / name
    os.mkfifo(path)
    return path


EVERY_COMMAND = (
    "check {}",
    "check {dir}",
    "check {dir}/**/*",
    "report {}",
    "lab report --folder {}",
    "fold {} --output {dir}/out.onnx",
)
WITH_MODEL = (
    "check {} --model {dir}/code.py:build",
    "repair {} --model {dir}/code.py:build --data digits --output {dir}/out.pt",
    "fold {} --model {dir}/code.py:build --output {dir}/out.pt2",
)


@hostile("place", "a pipe without a writer", *EVERY_COMMAND)
def fifo(folder: Path) -> Path:
    return pipe(folder)


@hostile("place", "a pipe without a suffix in a folder", "check {dir}", "lab report --folder {dir}")
def fifo_without_suffix(folder: Path) -> Path:
    return pipe(folder, "pipe")


@hostile("place", "a pipe as a record in a folder", "report {}", "lab report --folder {dir}", "check {}")
def fifo_as_record(folder: Path) -> Path:
    return pipe(folder, "record.json")


@hostile("place", "a pipe beside a model", *WITH_MODEL)
def fifo_with_model(folder: Path) -> Path:
    (folder / "code.py").write_text(CODE)
    return pipe(folder)


@hostile("place", "/dev/zero", "check {}", "report {}", "lab report --folder {}", "fold {} --output {dir}/out.onnx")
def device(folder: Path) -> Path:
    path = folder / "zero.pt"
    path.symlink_to("/dev/zero")
    return path


@hostile("place", "/dev/zero as a record", "report {}", "lab report --folder {dir}")
def device_as_record(folder: Path) -> Path:
    path = folder / "record.json"
    path.symlink_to("/dev/zero")
    return path


@hostile("place", "a symlink to itself", *EVERY_COMMAND[:1], *EVERY_COMMAND[2:])
def link_loop(folder: Path) -> Path:
    path = folder / "loop.pt"
    path.symlink_to("loop.pt")
    return path


@hostile("place", "a socket", *EVERY_COMMAND)
def unix_socket(folder: Path) -> Path:
    path = folder / "s.pt"
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
    return path


@hostile("place", "a folder that contains itself four times", "check {}", "check {}/**/*.pt", codes=(0, 1, 2))
def endless_folder(folder: Path) -> Path:
    path = folder / "endless"
    path.mkdir()
    written(path, MEMBERS, name="model.pt")
    for name in "abcd":
        (path / name).symlink_to(path, target_is_directory=True)
    return path


@hostile("place", "a folder with a pipe called .index.json", "check {}")
def fifo_as_index(folder: Path) -> Path:
    path = folder / "shards"
    path.mkdir()
    pipe(path, "model.safetensors.index.json")
    pipe(path, ".metadata")
    return path


@hostile("place", "shards that are pipes and devices", "check {}")
def fifo_as_shard(folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    pipe(folder, "a.safetensors")
    (folder / "b.safetensors").symlink_to("/dev/zero")
    path.write_text('{"weight_map": {"bn.running_mean": "a.safetensors", "bn.running_var": "b.safetensors"}}')
    return path


@hostile("place", "a sparse file of 1 TB", "check {}", "report {}")
def sparse(folder: Path) -> Path:
    path = folder / "hole.pt"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


@hostile("place", "a sparse zip of 1 TB")
def sparse_zip(folder: Path) -> Path:
    path = folder / "hole.pt"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 40)
    return path


@hostile("place", "a sparse pickle of 1 TB")
def sparse_pickle(folder: Path) -> Path:
    path = folder / "hole.pkl"
    with path.open("wb") as file:
        file.write(b"\x80\x02\x8e" + (1 << 39).to_bytes(8, "little"))
        file.truncate(1 << 40)
    return path


@hostile("place", "an output in a symlink loop", "check {} --format json --output {dir}/loop/out.json")
def output_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return written(folder, MEMBERS)
