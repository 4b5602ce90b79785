"""Reads what Keras saves: ``.h5``, ``.weights.h5`` and ``.keras``, with the momentum and eps of each layer.

Keras 3 stores the variables of a layer by number: ``layers/batch_normalization/vars/0`` to ``3`` are gamma, beta, the
moving mean and the moving variance. Older versions store them by name, ``bn/bn/moving_mean:0``. A ``.keras`` file is a
zip archive of such weights and of ``config.json``, which describes the layers. A whole model in HDF5 has the same
description in an attribute.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bnlab.errors import NotACheckpoint, TooMuchWork
from bnlab.observe.files.content import Content
from bnlab.observe.files.hdf5_file import Hdf5Contents, read_hdf5
from bnlab.observe.files.tensors import StoredTensor
from bnlab.observe.files.zip_archive import Archive

__all__ = ["CONFIG", "read_keras_archive", "read_keras_weights"]

CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_LARGEST_CONFIG = 64 << 20
_MOST_PARTS = 500_000
_DEEPEST = 64
_VARIABLES = re.compile(r"(?P<layer>.*?)(^|/)vars/(?P<index>\d)")
_BATCH_NORM = re.compile(r"(^|[/_.])(batch_?norm|bn)", re.IGNORECASE)
_CLASSES = frozenset({"BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization"})
_MODEL, _OPTIMIZER = "model_weights", "optimizer_weights"


@dataclass(frozen=True)
class _Configured:
    """A BN layer in the description of a model."""

    name: str
    path: str
    numbers: Mapping[str, float]
    variables: tuple[str, ...]


@dataclass(frozen=True)
class _Description:
    """The BN layers of a model by name and by the path of their variables, and the paths of all its layers."""

    by_name: Mapping[str, _Configured]
    by_path: Mapping[str, _Configured]
    others: frozenset[str]

    def layer(self, path: str, name: str) -> _Configured | None:
        return self.by_name.get(name) or self.by_path.get(path) or self.by_name.get(path.rpartition("/")[2])


def read_keras_weights(content: Content) -> dict[str, Any]:
    """Read an HDF5 file down to its tensors, which stay unread.

    Raises:
        MissingPackage, ValueError, OSError, RuntimeError, TooMuchWork: As `read_hdf5` does.
    """
    contents = read_hdf5(content.stream(), content.budget)
    return _tree(contents, contents.config)


def read_keras_archive(archive: Archive) -> dict[str, Any]:
    """Read a ``.keras`` file down to its tensors, which stay unread.

    Raises:
        NotACheckpoint: If its weights are in another format.
        MissingPackage, ValueError, OSError, RuntimeError, TooMuchWork: As `read_hdf5` does.
    """
    if _WEIGHTS not in archive:
        raise NotACheckpoint(
            f"file must hold {_WEIGHTS}, got a Keras model whose weights are elsewhere. "
            "Save it again: model.save_weights('name.weights.h5')."
        )
    config = archive.read(CONFIG, _LARGEST_CONFIG).decode("utf-8", "replace")
    contents = read_hdf5(archive.span(_WEIGHTS).stream(), archive.content.budget)
    return _tree(contents, config)


def _tree(contents: Hdf5Contents, config: str) -> dict[str, Any]:
    """Return the tensors by names that tell gamma from beta, with the numbers of the description beside them."""
    description = _described(config)
    tensors: dict[str, Any] = {}
    for path, tensor in contents.tensors.items():
        tensors[_without_repetition(path, contents.collections)] = tensor
    for layer, variables in _numbered(contents.tensors).items():
        configured = description.layer(layer, contents.names.get(layer, ""))
        names = _names(variables, layer, contents.names.get(layer, ""), configured, description)
        before = f"{layer}/" if layer else ""
        for index, name in enumerate(names):
            tensors[f"{before}{name}"] = tensors.pop(f"{before}vars/{index}")
    for start in [path[: path.rfind("/") + 1] for path in tensors if "moving_mean" in path]:
        configured = description.layer(start[:-1], contents.names.get(start[:-1], ""))
        if configured is not None:
            tensors |= {f"{start}{name}": value for name, value in configured.numbers.items()}
    return _by_collection(tensors)


def _by_collection(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the model and those of the optimizer as dicts of their own, where a file holds both."""
    tree: dict[str, Any] = {}
    for path, value in tensors.items():
        first, _, rest = path.partition("/")
        if first in (_MODEL, _OPTIMIZER) and rest:
            tree.setdefault(first, {})[rest] = value
        else:
            tree[path] = value
    return tree


def _without_repetition(path: str, collections: set[str]) -> str:
    """Return a path like bn/bn/gamma:0, of which the group bn repeats the name, as bn/gamma:0."""
    parts = path.split("/")
    for index in range(len(parts) - 2):
        if parts[index] == parts[index + 1] and "/".join(parts[: index + 1]) in collections:
            return "/".join(parts[:index] + parts[index + 1 :])
    return path


def _numbered(tensors: Mapping[str, StoredTensor]) -> dict[str, list[StoredTensor]]:
    """Return the numbered variables by the paths of their layers, where they are 0, 1, 2 ... in a row."""
    layers: dict[str, dict[int, StoredTensor]] = {}
    for path, tensor in tensors.items():
        match = _VARIABLES.fullmatch(path)
        if match is not None:
            layers.setdefault(match["layer"], {})[int(match["index"])] = tensor
    return {
        layer: [variables[index] for index in range(len(variables))]
        for layer, variables in layers.items()
        if set(variables) == set(range(len(variables)))
    }


def _names(
    variables: list[StoredTensor], path: str, name: str, configured: _Configured | None, description: _Description
) -> tuple[str, ...]:
    """Return the names of the variables of a BN layer; none for another layer."""
    if any(tensor.shape != variables[0].shape or len(tensor.shape) != 1 for tensor in variables):
        return ()
    if configured is not None:
        return configured.variables if len(configured.variables) == len(variables) else ()
    if path in description.others:
        return ()
    whole = _variables(scale=True, center=True)
    if len(variables) == len(whole):
        return whole  # no other layer of Keras has four vectors of one length
    if not (_BATCH_NORM.search(path.rpartition("/")[2]) or _BATCH_NORM.search(name)):
        return ()
    statistics = _variables(scale=False, center=False)
    return {3: ("beta", *statistics), 2: statistics}.get(len(variables), ())


def _variables(*, scale: bool, center: bool) -> tuple[str, ...]:
    return (*(["gamma"] if scale else []), *(["beta"] if center else []), "moving_mean", "moving_variance")


def _described(config: str) -> _Description:
    """Return the BN layers in the description of a model, which is left aside where it is damaged."""
    if len(config) > _LARGEST_CONFIG or config.count(",") + config.count("{") + config.count("[") > _MOST_PARTS:
        raise TooMuchWork(
            f"the description of a Keras model must have at most {_MOST_PARTS:,} parts, got more. "
            "Save the weights alone: model.save_weights('name.weights.h5')."
        )
    try:
        model = json.loads(config) if config else None
    except (ValueError, RecursionError):
        model = None
    layers = list(_layers(model))
    batch_norms = [layer for _, layer in layers if layer is not None]
    return _Description(
        {layer.name: layer for layer in batch_norms},
        {layer.path: layer for layer in batch_norms},
        frozenset(path for path, layer in layers if layer is None),
    )


def _layers(model: object) -> Iterator[tuple[str, _Configured | None]]:
    """Yield the path of each layer in the weights of Keras 3, with its numbers if it is a BN layer."""
    pending: list[tuple[str, object, int]] = [("", model, 0)]
    while pending:
        path, node, depth = pending.pop()
        config = node.get("config") if isinstance(node, dict) else None
        if not isinstance(node, dict) or not isinstance(config, dict) or depth > _DEEPEST:
            continue
        yield path, _configured(path, config) if node.get("class_name") in _CLASSES else None
        before = f"{path}/" if path else ""
        inner = config.get("layers")
        counts: Counter[str] = Counter()
        for layer in inner if isinstance(inner, list) else ():
            kind = _snake_case(str(layer.get("class_name"))) if isinstance(layer, dict) else ""
            number = f"_{counts[kind]}" if counts[kind] else ""
            counts[kind] += 1
            pending.append((f"{before}layers/{kind}{number}", layer, depth + 1))
        pending.append((f"{before}layer", config.get("layer"), depth + 1))


def _configured(path: str, config: Mapping[str, Any]) -> _Configured:
    numbers = [(name, config.get(name)) for name in ("momentum", "epsilon")]
    is_whole = {name: config.get(name) is not False for name in ("scale", "center")}
    return _Configured(
        str(config.get("name")),
        path,
        {name: float(value) for name, value in numbers if isinstance(value, (int, float)) and 0 <= value <= 1},
        _variables(scale=is_whole["scale"], center=is_whole["center"]),
    )


def _snake_case(name: str) -> str:
    """Return the name of a class as Keras writes it in paths: "batch_normalization"."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
