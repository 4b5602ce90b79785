"""Measures the errors of folded layers pair by pair, and the error of the whole folded model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.subject import Subject, usage_error_unless
from bnlab.observe.passes.tensors import copy_of_batch, map_tensors, tensors_in
from bnlab.remedies.witness import differences

__all__ = ["errors_of_models", "errors_of_pairs", "relative_error", "seeded", "tolerance_of", "variants"]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error that rounding explains, relative to the largest output."""

_SEED = 0x5EED
"""The seed for models that draw random numbers in eval mode. The original and the folded model draw the same ones."""

Pair = tuple[str, str, Callable[[Tensor], Tensor]]
"""The path of the first layer, the path of the last, and the function that replaces all layers from first to last."""


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """Return the tolerance for the least precise of some dtypes."""
    return max((_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0) or _TOLERANCES[torch.float32]


def relative_error(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference, relative to the largest absolute value. NaN equals NaN."""
    if expected.shape == got.shape and expected.numel() == 0:
        return 0.0
    if expected.is_complex() and got.is_complex():
        expected, got = torch.view_as_real(expected), torch.view_as_real(got)
    return differences({"": [expected]}, {"": [got]})[""]


@contextmanager
def seeded(subject: Subject) -> Iterator[None]:
    """Put a model in eval mode without gradients, with the same random numbers each time, and restore it afterwards."""
    with subject.untouched(), torch.no_grad():
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002 - models draw from the global generator
        subject.model.eval()
        yield


def errors_of_pairs(original: Subject, example: Batch, pairs: dict[str, Pair]) -> dict[str, float]:
    """Run the original once and compare each pair with its replacement on the input that the pair gets.

    Only the input of the pair that runs is held in memory, or several where pairs are nested.

    Args:
        original: The original model.
        example: A batch.
        pairs: The pairs, by any names.

    Returns:
        The largest error of each pair, relative to its largest output; inf for a pair that did not run.
    """
    waiting: dict[str, Tensor] = {}
    errors: dict[str, float] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            waiting[name] = tensors_in([arguments, keywords])[0].clone()  # some layers change their input in place

        return hook

    def leave(name: str, folded: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            error = relative_error(output, folded(waiting.pop(name)))
            errors[name] = max(error, errors.get(name, 0.0))

        return hook

    model = original.model
    with seeded(original), usage_error_unless("forward must run on the example"):
        for name, (first, last, folded) in pairs.items():
            model.get_submodule(first).register_forward_pre_hook(enter(name), with_kwargs=True)
            model.get_submodule(last).register_forward_hook(leave(name, folded))
        original.run(copy_of_batch(example))  # untouched() removes the hooks
    return {name: errors.get(name, float("inf")) for name in pairs}


def errors_of_models(
    original: Subject,
    folded: nn.Module,
    example: Batch,
    tolerance: float | None,
) -> tuple[float, list[float]]:
    """Return the errors of the folded model on the example, and on each random input on which the original runs.

    Raises:
        UsageError: If an error exceeds the tolerance, or if there is no output, or no finite output, to compare.
    """
    model, copy = original.model, Subject(folded, original.forward)
    expected = _outputs(original, example)
    non_empty = [tensor for tensor in expected if tensor.numel()]
    if non_empty and not any(bool(tensor.isfinite().any()) for tensor in non_empty):
        raise UsageError(
            "fold: the model must give a finite output on the example to prove that folding changed nothing, got NaN "
            "or inf only. Look for them in the example, and in the model with bnlab check."
        )
    on_example = _error(copy, example, expected, model, tolerance)
    others = []
    for other in variants(example):
        try:
            expected = _outputs(original, other)
        except Exception:
            continue  # some models accept only certain values
        others.append(_error(copy, other, expected, model, tolerance))
    return on_example, others


def _outputs(subject: Subject, batch: Batch) -> list[Tensor]:
    with seeded(subject):
        return [tensor.clone() for tensor in tensors_in(subject.run(copy_of_batch(batch)))]


def _error(
    folded: Subject,
    batch: Batch,
    expected: list[Tensor],
    model: nn.Module,
    tolerance: float | None,
) -> float:
    with usage_error_unless("forward must run with its BN layers replaced"):
        got = _outputs(folded, batch)
    dtypes = [tensor.dtype for tensor in (*expected, *model.parameters())]
    allowed = tolerance_of(dtypes) if tolerance is None else tolerance
    error = _largest_error(expected, got)
    if error > allowed:
        raise UsageError(
            f"fold: the folded model must give the output of the original within {allowed:.0e} of the largest, got "
            f"{error:.1e}. Give a tolerance, or fold the model in float64."
        )
    return error


def _largest_error(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest relative error of the floating-point outputs.

    Integer outputs count only if there are no others, because ties may change them.
    """
    if [(t.shape, t.dtype) for t in before] != [(t.shape, t.dtype) for t in after]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    if not pairs:
        raise UsageError("fold: the model must return tensors to prove that folding changed nothing, got none.")
    floating = [(a, b) for a, b in pairs if a.is_floating_point() or a.is_complex()]
    return max(relative_error(a, b) for a, b in floating or pairs)


def variants(example: Batch, count: int = 2) -> Iterator[Batch]:
    """Yield other inputs of the same form: normal values with the mean and deviation of each floating-point tensor.

    Integers may be indices, so they are only shuffled along the batch. A constant tensor, such as a mask, stays as it
    is, unless all floating-point tensors are constant. A graph gets other tensors too.
    """
    floating = [tensor for tensor in tensors_in(example) if tensor.is_floating_point() and tensor.numel()]
    constant = all(bool((tensor == tensor.flatten()[0]).all()) for tensor in floating)
    for seed in range(1, count + 1):
        generator = torch.Generator().manual_seed(seed)
        replace = partial(_other, generator=generator, spread=constant)
        yield map_tensors(example, replace, partial(_other_object, replace=replace))


def _other_object(item: Any, replace: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Return a copy of a graph with other tensors, or of an object that can replace its tensors as a graph can."""
    other = copy_of_batch(item)
    apply = getattr(other, "apply", None)
    return apply(replace) if callable(apply) else other


def _other(tensor: Tensor, generator: torch.Generator, *, spread: bool) -> Tensor:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.dim()):
        return tensor.clone()
    if not tensor.is_floating_point():
        return tensor[torch.randperm(tensor.size(0), generator=generator).to(tensor.device)]
    wide = tensor.detach().cpu().double()
    std = 1.0 if spread else float(wide.std(correction=0))
    normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (wide.mean() + std * normal).to(tensor)
