"""State dicts and files for the tests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bnlab.observe.evidence import LayerState


def layer_state(channels: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the state of a trained BN layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": (0.5 + torch.rand(channels, generator=generator)).to(dtype),
        "bias": torch.randn(channels, generator=generator).to(dtype),
        "running_mean": torch.randn(channels, generator=generator).to(dtype),
        "running_var": (0.5 + torch.rand(channels, generator=generator)).to(dtype),
        "num_batches_tracked": torch.tensor(1000),
    }


def state_dict(*names: str, channels: int = 4, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a flat state dict with a convolution and a BN layer for each name."""
    state: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(names or ("bn1", "layer1.bn")):
        state[f"{prefix}conv{seed}.weight"] = torch.randn(channels, 3, 3, 3)
        state |= {f"{prefix}{name}.{key}": value for key, value in layer_state(channels, seed=seed).items()}
    return state


def small_network() -> nn.Sequential:
    """Return a trained-looking CNN with two BN layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    for _ in range(60):
        model(1 + 2 * torch.randn(8, 3, 9, 9))
    return model


def nested_network() -> nn.Sequential:
    """Return a CNN in eval mode with three BN layers, each with other settings; input (N, 3, 8, 8)."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(4, eps=0.25))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), inner)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def assert_layers_of(model: nn.Module, layers: Iterable[LayerState], prefix: str = "") -> None:
    """Assert that layers have the numbers, eps and momentum of those in a model, whose names lack `prefix`."""
    for layer in layers:
        module = model.get_submodule(layer.name.removeprefix(prefix))
        for name in ("running_mean", "running_var", "weight", "bias"):
            assert np.array_equal(getattr(layer, name), getattr(module, name).detach().cpu().double().numpy())
        assert layer.num_batches_tracked == int(module.num_batches_tracked)
        assert (layer.hyperparameters.eps, layer.hyperparameters.momentum) == (module.eps, module.momentum)


def save(value: object, path: Path, *, legacy: bool = False, protocol: int = 2) -> Path:
    """Write a file with torch.save, in the zip or the legacy format."""
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def with_pickle(path: Path, pickle: bytes) -> Path:
    """Replace the pickle of a zip checkpoint."""
    return rewrite_zip(path, lambda name, data: pickle if name.endswith("data.pkl") else data)


def rewrite_zip(path: Path, change, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Rewrite a zip archive record by record. `change` returns the new data, or None to drop the record."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    path.write_bytes(buffer.getvalue())
    return path


def on_device(path: Path, device: str) -> Path:
    """Change a checkpoint so that its storages claim to lie on another device."""

    def pickled(text: str) -> bytes:
        return b"X" + len(text).to_bytes(4, "little") + text.encode()

    def change(_: str, data: bytes) -> bytes:
        return data.replace(pickled("cpu"), pickled(device))

    if zipfile.is_zipfile(path):
        return rewrite_zip(path, change)
    path.write_bytes(change("", path.read_bytes()))
    return path
