"""Exports a folded model with torch.export, reads the file back, and compares it with the model."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.passes.batches import samples_in
from bnlab.observe.passes.calling import Batch, Forward, run_batch
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.observe.passes.tensors import copy_of_batch, map_tensors, tensors_in
from bnlab.remedies.fold.proof import relative_error, seeded, tolerance_of
from bnlab.wording import error_line

__all__ = ["exported"]


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


def exported(model: nn.Module, example: Batch, forward: Forward = run_batch) -> tuple[bytes, str]:
    """Return the content of a `.pt2` file for a model, and a note on the batch sizes that it accepts.

    The batch dimension is dynamic if torch.export allows it. Otherwise it is that of the example. The file is loaded
    again, and must give the output of the model on the example, and on a batch of another size if that is allowed. It
    takes the arguments with which the model is called on the example.

    Args:
        model: The model in eval mode, as `fold` returns it. It does not change.
        example: A batch, as for `fold`.
        forward: Calls the model on the batch.

    Raises:
        UsageError: If torch cannot export the model, or if the file gives another output.
    """
    samples = samples_in(example)
    arguments = _arguments(Subject(model, forward), example)
    dynamic, reason = _dynamic(model, _resized(arguments, samples, max(2, samples)), max(2, samples))
    if dynamic is not None and samples:
        others = [arguments, _resized(arguments, samples, max(2, samples) + 1)]
        try:
            return _proven(dynamic, model, others), "the batch may have any size"
        except UsageError as error:
            reason = str(error)
    with usage_error_unless("torch.export must take it"), _quiet(), seeded(Subject(model)):
        static = torch.export.export(model, *arguments)
    return _proven(static, model, [arguments]), f"the batch must have {samples} samples, because {reason}"


def _arguments(subject: Subject, batch: Batch) -> _Arguments:
    """Return copies of the arguments with which a model is called on a batch."""
    calls: list[_Arguments] = []

    def take(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(copy_of_batch((positional, keywords)))

    with seeded(subject), usage_error_unless("forward must run on the example"):
        subject.model.register_forward_pre_hook(take, with_kwargs=True)  # seeded() removes it
        subject.run(copy_of_batch(batch))
    return calls[-1]


def _dynamic(model: nn.Module, arguments: _Arguments, samples: int) -> tuple[torch.export.ExportedProgram | None, str]:
    """Export with a dynamic batch dimension. There are at least 2 samples, because torch treats 1 as a constant."""
    size = torch.export.Dim("batch")

    def dimensions(tensor: Tensor) -> Any:  # noqa: ANN401 - torch defines the type
        return {0: size} if tensor.dim() and tensor.size(0) == samples else None

    positional, keywords = arguments
    shapes = map_tensors(arguments, dimensions)
    try:
        with _quiet(), seeded(Subject(model)):
            named = {**_by_name(model, shapes[0]), **shapes[1]} if keywords else shapes[0]
            return torch.export.export(model, positional, keywords, dynamic_shapes=named), ""
    except Exception as error:
        return None, f"torch.export raises {error_line(error, 150)}"


def _by_name(model: nn.Module, positional: tuple[Any, ...]) -> dict[str, Any]:
    """Return positional arguments by the names of the parameters, as torch.export wants them beside keywords."""
    names = list(inspect.signature(model.forward).parameters) if positional else []
    return dict(zip(names, positional, strict=False))


def _resized(arguments: _Arguments, samples: int, size: int) -> _Arguments:
    """Repeat the samples of a batch up to a new batch size."""

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.size(0) != samples or samples == 0:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % samples]

    resized: _Arguments = map_tensors(arguments, resize)
    return resized


def _proven(program: torch.export.ExportedProgram, model: nn.Module, calls: Sequence[_Arguments]) -> bytes:
    """Write a program, read it back, compare it with the model, and return the content of the file.

    Raises:
        UsageError: If the program and the model give different outputs.
    """
    file = io.BytesIO()
    with usage_error_unless("torch.export must write it and read it back"), _quiet():
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
    for call in calls:
        with seeded(Subject(model)), usage_error_unless("the exported model must run"), _quiet():
            positional, keywords = copy_of_batch(call)
            expected = [tensor.clone() for tensor in tensors_in(model(*positional, **keywords))]
            positional, keywords = copy_of_batch(call)
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
