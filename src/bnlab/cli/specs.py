"""Resolves SPEC arguments: a built-in name, or `package.module:callable`."""

from __future__ import annotations

import contextlib
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnlab.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TARGET", "import_spec", "is_spec", "load_data", "load_example", "load_loss", "load_metric", "load_model"]

TARGET = "TARGET"
"""The name of the argument that may be a spec or a path; the options take specs only."""

_SPEC = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def load_data(spec: str, option: str = "--data") -> Any:
    """Return the batches that a spec stands for.

    Args:
        spec: `digits`, `mnist` or `cifar10`, alone or with `:train` or `:test`; or `package.module:callable`, which is
            called without arguments.
        option: The option that holds the spec; errors begin with it.

    Returns:
        An iterable of batches that can be iterated again.

    Raises:
        UsageError: If the spec cannot be resolved, its callable raises or exits, or it returns no such batches.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets
    from bnlab.observe.passes.batches import require_data

    if datasets.is_data_set(spec):
        return datasets.load(spec)
    batches = _resolve(spec, option, datasets.NAMES, call=True)
    if isinstance(batches, Iterator):
        raise UsageError(
            f"{option}: {spec} must return batches that can be run through again, got a one-shot "
            f"{type(batches).__name__}. Return a list, or the loader itself."
        )
    require_data(f"{option} {spec}", batches)
    return batches


def load_example(spec: str, option: str = "--example") -> Any:
    """Return one batch to run a model on.

    Args:
        spec: As for `load_data`. A built-in name stands for the images of its first batch. A callable returns the
            batch.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its callable raises, exits or returns None.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets

    if datasets.is_data_set(spec):
        return datasets.load(spec)[0][0]
    example = _resolve(spec, option, datasets.NAMES, call=True)
    if example is None:
        raise UsageError(f"{option}: {spec} must return a batch, got None.")
    return example


def load_metric(spec: str, option: str = "--metric") -> Callable[[nn.Module, Any], float]:
    """Return the metric that a spec stands for: metric(model, data) -> float.

    Args:
        spec: `accuracy` or `loss`, or `package.module:callable`, which is the metric itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    from bnlab.lab import metrics

    if spec in metrics.NAMES:
        return metrics.load(spec)
    metric: Callable[[nn.Module, Any], float] = _resolve(spec, option, metrics.NAMES, call=False)
    if not callable(metric):
        raise UsageError(f"{option}: {spec} must be callable as metric(model, data), got {type(metric).__name__}.")
    return metric


def load_loss(spec: str, option: str = "--loss") -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss that a spec stands for: loss(model, batch) -> scalar.

    Args:
        spec: `package.module:callable`, which is the loss itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    loss: Callable[[nn.Module, Any], Tensor] = _resolve(spec, option, (), call=False)
    if not callable(loss):
        raise UsageError(f"{option}: {spec} must be callable as loss(model, batch), got {type(loss).__name__}.")
    return loss


def load_model(spec: str, option: str = "--model") -> nn.Module:
    """Import `package.module:callable` and call it without arguments to build a model.

    Args:
        spec: The spec.
        option: As for `load_data`; TARGET if the model itself is the target.

    Raises:
        UsageError: If the callable does not exist, raises, exits, or does not return a module.
    """
    model = _resolve(spec, option, (), call=True)

    from torch import nn

    if not isinstance(model, nn.Module):
        subject = f"{spec}: target" if option == TARGET else f"{option}: {spec}"
        raise UsageError(f"{subject} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def is_spec(text: str) -> bool:
    """Whether a text has the form `package.module:callable`; identifiers are those of Python, in any script."""
    return _SPEC.fullmatch(text) is not None


def _resolve(spec: str, option: str, names: Sequence[str], *, call: bool) -> Any:
    """Import what a spec names and, if `call` is set, call it. Any exception becomes an error of one line."""
    rule = f"{option}: value must be {', '.join(names)}{' or ' if names else ''}package.module:callable, got {spec!r}"
    if not is_spec(spec):
        raise UsageError(f"{rule}.")
    try:
        return import_spec(spec, call=call)
    except (Exception, SystemExit) as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split()).rstrip(".")
        if option == TARGET:
            rule = f"{spec}: target must be a file, or a callable that returns a model, got {reason}"
            raise UsageError(f"{rule}.") from err
        raise UsageError(f"{rule} ({reason}).") from err


def import_spec(spec: str, *, call: bool) -> Any:
    """Import what `package.module:callable` names, from the current folder first, and call it if `call` is set.

    Afterwards the current folder is the last entry of `sys.path`, because an imported function may import more modules
    when it runs. Exceptions of the import or the call pass through.
    """
    module_name, _, attribute = spec.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        target: Any = operator.attrgetter(attribute)(importlib.import_module(module_name))
        return target() if call else target
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
