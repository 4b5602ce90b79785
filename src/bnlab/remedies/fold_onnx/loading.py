"""Reads a whole ONNX model, with the weights from files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnlab.errors import BnlabError, DamagedFile, MissingPackage, NotACheckpoint, UsageError
from bnlab.observe.files.content import open_content
from bnlab.observe.files.onnx_model.external_data import ModelFile
from bnlab.observe.files.onnx_model.skim import skim
from bnlab.observe.files.onnx_model.tensor_values import number_of_values, tensor_values
from bnlab.remedies.fold_onnx.effort import count_work
from bnlab.remedies.fold_onnx.scope import protos_of

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = ["MAX_BYTES", "load_whole"]

MAX_BYTES = (1 << 31) - 1
"""The largest protobuf message."""


def load_whole(path: Path) -> ModelProto:
    """Read a model with all its weights, so that it needs no other file.

    The graph is parsed without its large tensors first, and its work is counted.

    Raises:
        TooMuchWork: If a fold of the model would take more work than that of any network.
        UsageError: If the model is larger than 2 GB, or has a training graph.
        UnreadableFile, NotACheckpoint, DamagedFile: If a file cannot be read.
        MissingPackage: If the onnx package is not installed.
    """
    try:
        import onnx  # noqa: F401
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingPackage(
            f"{path}: model must be readable without the onnx package, got an ONNX model. "
            "Install it: pip install 'bnlab[onnx]'."
        ) from None
    try:
        return _loaded(path)
    except DecodeError:
        raise DamagedFile(f"{path}: file must be a whole ONNX model, got bytes that do not parse.") from None
    except BnlabError as err:
        raise type(err)(f"{path}: {err}") from None


def _loaded(path: Path) -> ModelProto:
    import onnx

    content = open_content(path)
    if content.size > MAX_BYTES:
        raise NotACheckpoint("file must be an ONNX model, got a file larger than 2 GB.")
    count_work(onnx.ModelProto.FromString(skim(content)))
    model = onnx.ModelProto.FromString(content.read_at(0, content.size))
    if not model.graph.node:
        raise NotACheckpoint("file must be an ONNX model, got one without a graph.")
    if model.training_info:
        raise UsageError("model must be made for inference, got one with a training graph.")
    _embed(model, ModelFile.at(path))
    return model


def _embed(model: ModelProto, file: ModelFile) -> None:
    """Load weights from external files into the model."""
    from onnx import helper, numpy_helper

    total = model.ByteSize()
    for tensor in _external(model):
        try:
            total += (
                number_of_values(tensor.dims) * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
            )
            if total > MAX_BYTES:
                raise UsageError(
                    "model must be smaller than 2 GB with its external data, got more. "
                    "Fold the model in torch before it is exported."
                )
            values = tensor_values(tensor, file)
        except BnlabError:
            raise
        except (ValueError, TypeError, KeyError):  # a location that is not UTF-8, an unknown data type
            raise DamagedFile(f"tensor {tensor.name!r} must hold the values it promises, got others.") from None
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _external(model: ModelProto) -> Iterator[TensorProto]:
    for scope, _, _ in protos_of(model):
        tensors = [*getattr(scope, "initializer", ())]
        sparse = [*getattr(scope, "sparse_initializer", ())]
        for node in scope.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        tensors += [part for tensor in sparse for part in (tensor.values, tensor.indices)]
        yield from (tensor for tensor in tensors if tensor.external_data)
