"""Exports a folded model with torch.export, reads the file back, and compares it with the model."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.passes.batches import Batch, map_tensors, run_batch, samples_in, tensors_in
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.remedies.fold.proof import relative_error, seeded, tolerance_of

__all__ = ["exported"]


def exported(model: nn.Module, example: Batch) -> tuple[bytes, str]:
    """Return the content of a `.pt2` file for a model, and a note on the batch sizes that it accepts.

    The batch dimension is dynamic if torch.export allows it. Otherwise it is that of the example. The file is loaded
    again, and must give the output of the model on the example, and on a batch of another size if that is allowed.

    Args:
        model: The model in eval mode, as `fold` returns it. It does not change.
        example: A batch: a tensor, a tuple or list (input first), or a dict (passed as keywords).

    Raises:
        UsageError: If torch cannot export the model, or if the file gives another output.
    """
    inputs = example[0] if isinstance(example, (tuple, list)) and example else example
    samples = samples_in(inputs)
    dynamic, reason = _dynamic(model, _resized(inputs, samples, max(2, samples)), max(2, samples))
    if dynamic is not None and samples:
        others = [inputs, _resized(inputs, samples, max(2, samples) + 1)]
        try:
            return _proven(dynamic, model, others), "the batch may have any size"
        except UsageError as error:
            reason = str(error)
    with usage_error_unless("torch.export must take it"), _quiet(), seeded(Subject(model)):
        static = torch.export.export(model, *_arguments(inputs))
    return _proven(static, model, [inputs]), f"the batch must have {samples} samples, because {reason}"


def _dynamic(model: nn.Module, batch: Batch, samples: int) -> tuple[torch.export.ExportedProgram | None, str]:
    """Export with a dynamic batch dimension. There are at least 2 samples, because torch treats 1 as a constant."""
    size = torch.export.Dim("batch")

    def dimensions(tensor: Tensor) -> Any:  # noqa: ANN401 - torch defines the type
        return {0: size} if tensor.dim() and tensor.size(0) == samples else None

    shapes = map_tensors(batch, dimensions)
    positional, keywords = _arguments(batch)
    try:
        with _quiet(), seeded(Subject(model)):
            named = shapes if isinstance(batch, Mapping) else (shapes,)
            return torch.export.export(model, positional, keywords, dynamic_shapes=named), ""
    except Exception as error:
        text = " ".join(str(error).split())
        return None, f"torch.export raises {type(error).__name__}: {text[:150]}"


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def _resized(batch: Any, samples: int, size: int) -> Any:  # noqa: ANN401
    """Repeat the samples of a batch up to a new batch size."""

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.size(0) != samples or samples == 0:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % samples]

    return map_tensors(batch, resize)


def _proven(program: torch.export.ExportedProgram, model: nn.Module, batches: list[Any]) -> bytes:
    """Write a program, read it back, compare it with the model, and return the content of the file.

    Raises:
        UsageError: If the program and the model give different outputs.
    """
    file = io.BytesIO()
    with usage_error_unless("torch.export must write it and read it back"), _quiet():
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
    for batch in batches:
        with seeded(Subject(model)), usage_error_unless("the exported model must run"), _quiet():
            expected = [tensor.clone() for tensor in tensors_in(run_batch(model, map_tensors(batch, torch.clone)))]
            positional, keywords = _arguments(map_tensors(batch, torch.clone))
            got = tensors_in(loaded(*positional, **keywords))
        allowed = tolerance_of(tensor.dtype for tensor in (*expected, *model.parameters()))
        errors = [relative_error(a, b) for a, b in zip(expected, got, strict=False)]
        if len(expected) != len(got) or not max(errors, default=0.0) <= allowed:
            raise UsageError(
                f"export: the file must give the output of the model within {allowed:.0e} of the largest, got "
                f"{max(errors, default=float('inf')):.1e}."
            )
    return file.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log messages of torch about its own internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
