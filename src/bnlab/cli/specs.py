"""What the SPEC arguments stand for: a built-in name, or `package.module:callable`."""

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
    from torch import nn

__all__ = ["TARGET", "imported", "is_spec", "load_data", "load_example", "load_metric", "load_model"]

TARGET = "TARGET"
"""The argument that may be a spec or a path, where the options are specs only."""

_SPEC = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def load_data(spec: str, option: str = "--data") -> Any:
    """Return the batches that a spec stands for.

    Args:
        spec: `digits`, `mnist` or `cifar10`, with `:train` or `:test` or alone; or `package.module:callable`, which is
            called without arguments.
        option: Under which the spec was given; errors begin with it.

    Returns:
        Something that yields batches and can be run through again.

    Raises:
        UsageError: If the spec stands for nothing, its callable raises or exits, or it returns no such batches.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets
    from bnlab.observe.passes.batches import require_data

    if datasets.is_data_set(spec):
        return datasets.load(spec)
    found = _resolve(spec, option, datasets.NAMES, call=True)
    if isinstance(found, Iterator):
        raise UsageError(
            f"{option}: {spec} must return batches that can be run through again, got a one-shot "
            f"{type(found).__name__}. Return a list, or the loader itself."
        )
    require_data(f"{option} {spec}", found)
    return found


def load_example(spec: str, option: str = "--example") -> Any:
    """Return one batch to run a model on.

    Args:
        spec: As for `load_data`; a built-in name stands for the images of its first batch, what a callable returns is
            the batch.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec stands for nothing, or its callable raises, exits or returns None.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets

    if datasets.is_data_set(spec):
        return datasets.load(spec)[0][0]
    found = _resolve(spec, option, datasets.NAMES, call=True)
    if found is None:
        raise UsageError(f"{option}: {spec} must return a batch, got None.")
    return found


def load_metric(spec: str, option: str = "--metric") -> Callable[[nn.Module, Any], float]:
    """Return the metric that a spec stands for: metric(model, data) -> float, higher is better.

    Args:
        spec: `accuracy` or `loss`, or `package.module:callable`, which is the metric itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec stands for nothing that can be called.
    """
    from bnlab.lab import metrics

    if spec in metrics.NAMES:
        return metrics.load(spec)
    found = _resolve(spec, option, metrics.NAMES, call=False)
    if not callable(found):
        raise UsageError(f"{option}: {spec} must be callable as metric(model, data), got {type(found).__name__}.")
    metric: Callable[[nn.Module, Any], float] = found
    return metric


def load_model(spec: str, option: str = "--model") -> nn.Module:
    """Import `package.module:callable` and call it without arguments to build a model.

    Args:
        spec: As it was given.
        option: As for `load_data`; TARGET, if the model itself is the target.

    Raises:
        UsageError: If there is no such callable, it raises or exits, or it returns something else than a module.
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
    """Import what a spec names, and call it if asked; what that raises is one line."""
    rule = f"{option}: value must be {', '.join(names)}{' or ' if names else ''}package.module:callable, got {spec!r}"
    if not is_spec(spec):
        raise UsageError(f"{rule}.")
    try:
        return imported(spec, call=call)
    except (Exception, SystemExit) as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split()).rstrip(".")
        if option == TARGET:
            rule = f"{spec}: target must be a file, or a callable that returns a model, got {reason}"
            raise UsageError(f"{rule}.") from err
        raise UsageError(f"{rule} ({reason}).") from err


def imported(spec: str, *, call: bool) -> Any:
    """Import what `package.module:callable` names, from the current folder first, and call it if asked.

    Afterwards the current folder is the last that is searched: what was imported may import more when it is used. What
    the import or the call raises is up to them.
    """
    module_name, _, attribute = spec.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found: Any = operator.attrgetter(attribute)(importlib.import_module(module_name))
        return found() if call else found
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
