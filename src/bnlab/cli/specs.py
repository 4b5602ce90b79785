"""Resolves SPEC arguments: a built-in name, `package.module:callable`, or `file.py:callable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bnlab.cli.importing import FORMS, hint, import_spec, is_spec
from bnlab.cli.stopping import Stopped
from bnlab.errors import UsageError
from bnlab.wording import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TARGET", "load_data", "load_example", "load_forward", "load_loss", "load_metric", "load_model"]

TARGET = "TARGET"
"""The name of the argument that may be a spec or a path; the options take specs only."""


def load_data(spec: str, option: str = "--data") -> Any:
    """Return the batches that a spec stands for.

    Args:
        spec: `digits`, `mnist` or `cifar10`, alone or with `:train` or `:test`; or a callable (see
            :func:`bnlab.cli.importing.import_spec`), which is called without arguments. A callable that returns an
            iterator, such as a generator function, is called again for each pass.
        option: The option that holds the spec; errors begin with it.

    Returns:
        An iterable of batches that can be iterated again.

    Raises:
        UsageError: If the spec cannot be resolved, its callable raises or exits, or it returns no such batches.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets
    from bnlab.observe.passes.kept_batches import require_data

    if datasets.is_data_set(spec):
        return datasets.load(spec)
    batches = _resolve(spec, option, datasets.NAMES, call=True, variants=datasets.split_names())
    if isinstance(batches, Iterator):  # the function itself gives the batches of every pass
        batches = _resolve(spec, option, datasets.NAMES, call=False)
    return require_data(f"{option} {spec}", batches)


def load_example(spec: str, option: str = "--example") -> Any:
    """Return one batch to run a model on, or data of which the first batch is used.

    Args:
        spec: As for `load_data`. A built-in name stands for the images of its first batch. A callable returns the
            batch, or a loader.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its callable raises, exits or returns None.
        UnreadableFile, DamagedFile, MissingPackage: If a built-in data set cannot be read.
    """
    from bnlab.lab import datasets

    if datasets.is_data_set(spec):
        return datasets.load(spec)[0][0]
    example = _resolve(spec, option, datasets.NAMES, call=True, variants=datasets.split_names())
    if example is None:
        raise UsageError(f"{option}: {spec} must return a batch, got None.")
    return example


def load_metric(spec: str, option: str = "--metric") -> Callable[[nn.Module, Any], float] | str:
    """Return the metric that a spec stands for: metric(model, data) -> float, or the name of a metric as it is.

    Args:
        spec: `accuracy`, `loss` or `miou`, alone or with the label that means no class, as in `miou:255`; or a
            callable, which is the metric itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    from bnlab.observe.named_metrics import NAMES, is_metric_name

    return spec if is_metric_name(spec) else _function(spec, option, "metric(model, data)", NAMES)


def load_loss(spec: str, option: str = "--loss") -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss that a spec stands for: loss(model, batch) -> scalar.

    Args:
        spec: A callable, which is the loss itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    return _function(spec, option, "loss(model, batch)")


def load_forward(spec: str, option: str = "--forward") -> Callable[[nn.Module, Any], Any]:
    """Return the function with which a model is called on a batch: forward(model, batch) -> output.

    Args:
        spec: A callable, which is the function itself and is not called here.
        option: As for `load_data`.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    return _function(spec, option, "forward(model, batch)")


def load_model(spec: str, option: str = "--model") -> nn.Module:
    """Import a callable and call it without arguments to build a model.

    Args:
        spec: The spec.
        option: As for `load_data`; TARGET if the model itself is the target, which may also be an exported program.

    Raises:
        UsageError: If the callable does not exist, raises, exits, or does not return a module.
    """
    model = _resolve(spec, option, (), call=True)

    from torch import nn

    from bnlab.observe.programs.opened import is_program

    if option == TARGET and is_program(model):
        model = model.module()
    if not isinstance(model, nn.Module):
        subject = f"{spec}: target" if option == TARGET else f"{option}: {spec}"
        raise UsageError(f"{subject} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _function(spec: str, option: str, signature: str, names: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the callable of a spec, which is not called.

    Raises:
        UsageError: If the spec cannot be resolved, or its value is not callable.
    """
    function: Callable[..., Any] = _resolve(spec, option, names, call=False)
    if not callable(function):
        raise UsageError(f"{option}: {spec} must be callable as {signature}, got {type(function).__name__}.")
    return function


def _resolve(spec: str, option: str, names: Sequence[str], *, call: bool, variants: Sequence[str] = ()) -> Any:
    """Import what a spec names and, if `call` is set, call it. Any exception becomes an error of one line.

    Args:
        spec: The spec.
        option: The option that holds it.
        names: The built-in names that the option takes too.
        call: Whether to call what is imported.
        variants: Longer forms of the built-in names, to be suggested for a spec that is like one.
    """
    forms = f"{', '.join(names)}, {FORMS}" if names else FORMS
    rule = f"{option}: value must be {forms}, got {spec!r}"
    if not is_spec(spec):
        meant = f" Name a callable in the file, as in {spec}:build." if spec.endswith(".py") else ""
        raise UsageError(f"{rule}.{meant or did_you_mean(spec, [*names, *variants])}")
    try:
        return import_spec(spec, call=call)
    except Stopped:
        raise
    except (Exception, SystemExit) as err:
        reason = " ".join(f"{type(err).__name__}: {err}".split()).rstrip(".")
        is_missing = isinstance(err, ModuleNotFoundError)
        meant = (did_you_mean(spec, variants) if is_missing else "") or hint(spec)
        if option == TARGET:
            rule = f"{spec}: target must be a file, or a callable that returns a model, got {reason}"
            raise UsageError(f"{rule}.{meant}") from err
        raise UsageError(f"{rule} ({reason}).{meant}") from err
