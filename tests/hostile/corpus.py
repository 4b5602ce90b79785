"""Writes a small honest file of every format with its real writer."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tests.samples import save, small_network

__all__ = ["WRITERS", "Sample", "write_corpus"]


@dataclass(frozen=True)
class Sample:
    """An honest file, or folder of files, of one format.

    Attributes:
        name: The format.
        folder: The folder with the files.
        target: What a user would name: a file, or "." for the folder.
    """

    name: str
    folder: Path
    target: str

    @property
    def files(self) -> list[Path]:
        """Every file that can be damaged."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def write_corpus(folder: Path) -> list[Sample]:
    """Write a file of every format whose writer is installed. The folders hold nothing else."""
    samples = []
    for name, (target, write) in WRITERS.items():
        inner = folder / name
        inner.mkdir(parents=True)
        try:
            write(inner / target)
        except ImportError:
            continue
        samples.append(Sample(name, inner, target))
    return samples


@cache
def _state() -> dict[str, torch.Tensor]:
    return small_network().state_dict()


def _arrays() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in _state().items()}


def _zip(path: Path) -> None:
    options = argparse.Namespace(lr=0.1, name="a", sizes=[1, 2])
    save({"state_dict": _state(), "epoch": 3, "options": options, "best": np.float32(0.5), "folder": Path("a/b")}, path)


def _legacy(path: Path) -> None:
    save({"state_dict": _state(), "epoch": 3, "options": argparse.Namespace(lr=0.1)}, path, legacy=True)


def _module(path: Path) -> None:
    save({"model": small_network(), "ema": None}, path)


def _module_legacy(path: Path) -> None:
    save(small_network(), path, legacy=True)


def _script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(small_network().eval(), torch.randn(1, 3, 9, 9)), str(path))


def _program(path: Path) -> None:
    torch.export.save(torch.export.export(small_network().eval(), (torch.randn(2, 3, 9, 9),)), path)


def _safetensors(path: Path) -> None:
    state = dict(_state())
    state["1.weight"] = state["1.weight"].half()
    state["4.weight"] = state["4.weight"].bfloat16()
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})


def _sharded(path: Path, write: Callable[[dict[str, torch.Tensor], Path], object], ending: str) -> None:
    items = list(_state().items())
    names = [f"model-{number:05}-of-00002{ending}" for number in (1, 2)]
    parts = [dict(items[:6]), dict(items[6:])]
    for name, part in zip(names, parts, strict=True):
        write(part, path.parent / name)
    weights = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    path.write_text(json.dumps({"metadata": {"total_size": 1000}, "weight_map": weights}))


def _distributed(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": _state()}, checkpoint_id=folder)


def _keras(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for layer in ("bn1", "bn2"):
            for key in ("gamma", "beta", "moving_mean", "moving_variance"):
                file[f"{layer}/{layer}/{key}:0"] = np.ones(4, dtype=np.float32)


def _keras_zip(path: Path) -> None:
    inner = path.with_name("model.weights.h5")
    _keras(inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, inner.name)
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": []}}))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
    inner.unlink()


def _flax(path: Path) -> None:
    import msgpack

    def array(values: np.ndarray) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))

    layers = [f"BatchNorm_{number}" for number in range(2)]
    one = np.ones(4, dtype=np.float32)
    tree = {
        "params": {layer: {"scale": array(one), "bias": array(one)} for layer in layers},
        "batch_stats": {layer: {"mean": array(one), "var": array(one)} for layer in layers},
    }
    path.write_bytes(msgpack.packb(tree))


def _paddle(path: Path) -> None:
    names = ("weight", "bias", "_mean", "_variance")
    path.write_bytes(pickle.dumps({f"bn.{name}": np.ones(4, dtype=np.float32) for name in names}, 2))


def _onnx(path: Path) -> None:
    """Write a model with a Conv, two BN nodes, an If with a BN in it, and parameters through Constant and Identity."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    def constants(name: str) -> list:
        ones = np.ones(4, dtype=np.float32)
        return [numpy_helper.from_array(ones, f"{name}.{key}") for key in "wbmv"]

    def bn(name: str, source: str, output: str):
        return helper.make_node(
            "BatchNormalization", [source, *(f"{name}.{key}" for key in "wbmv")], [output], name=name
        )

    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype=np.float32), "conv.weight")
    value = helper.make_tensor_value_info("t", TensorProto.FLOAT, ["n", 4, "h", "w"])
    then = helper.make_graph([bn("bn3", "c", "t")], "then", [], [value], constants("bn3"))
    other = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 4, "h", "w"])],
    )
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], name="conv"),
        bn("bn1", "a", "b"),
        helper.make_node("Identity", ["bn1.w"], ["bn2.w"]),
        helper.make_node("Constant", [], ["bn2.b"], value=numpy_helper.from_array(np.zeros(4, dtype=np.float32))),
        bn("bn2", "b", "c"),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, "h", "w"])],
        [weight, *constants("bn1"), *constants("bn2")[2:]],
    )
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def _onnx_external(path: Path) -> None:
    import onnx

    _onnx(path)
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def _record(path: Path) -> None:
    import bnlab

    checkpoint = path.with_suffix(".pt")
    save(_state(), checkpoint)
    path.write_text(bnlab.check(os.fspath(checkpoint), per_channel=True).dumps())
    checkpoint.unlink()


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "zip": ("model.pt", _zip),
    "legacy": ("model.pth", _legacy),
    "protocol 4": ("model.bin", lambda path: save(_state(), path, protocol=4)),
    "module": ("model.pt", _module),
    "module, legacy": ("model.pt", _module_legacy),
    "TorchScript": ("model.pt", _script),
    "torch.export": ("model.pt2", _program),
    "safetensors": ("model.safetensors", _safetensors),
    "safetensors index": ("model.safetensors.index.json", lambda path: _sharded(path, save_file, ".safetensors")),
    "torch index": ("pytorch_model.bin.index.json", lambda path: _sharded(path, torch.save, ".bin")),
    "distributed": (".", _distributed),
    "numpy pickle": ("model.pkl", lambda path: path.write_bytes(pickle.dumps({"model": _arrays(), "epoch": 3}))),
    "Paddle": ("model.pdparams", _paddle),
    "npz": ("model.npz", lambda path: np.savez(path, **_arrays())),
    "npz, packed": ("model.npz", lambda path: np.savez_compressed(path, **_arrays())),
    "Keras h5": ("model.weights.h5", _keras),
    "Keras zip": ("model.keras", _keras_zip),
    "Flax": ("model.msgpack", _flax),
    "ONNX": ("model.onnx", _onnx),
    "ONNX, external": ("model.onnx", _onnx_external),
    "record": ("record.json", _record),
}
"""The target and the writer of each format."""
