"""Watches a training loop of accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bnlab.integrations.training_callback import one_or_none, scaler_in_use
from bnlab.watching.logs import LogTarget
from bnlab.watching.watch import Watch
from bnlab.watching.watch import watch as watch_model

__all__ = ["watch"]


def watch(
    accelerator: Any,  # noqa: ANN401 - an Accelerator
    model: nn.Module,
    optimizer: Any = None,  # noqa: ANN401 - prepared or not
    *,
    every: int = 100,
    log: LogTarget = "auto",
) -> Watch:
    """Watch the BN layers of a model in a loop of accelerate, with the gradient scaler of the Accelerator.

    Use it as `bnlab.watch`. For a validation, `bnlab.integrations.recalibrated` takes the model, the loader and the
    optimizer that the Accelerator has prepared.

    Args:
        accelerator: The Accelerator that has prepared the model.
        model: The model that the loop calls.
        optimizer: The optimizer; None for the one that the Accelerator has prepared, or for every one that has
            parameters of the model if there are several.
        every: Number of steps from one sample of the statistics to the next.
        log: "auto" for the trackers of the Accelerator, None, or a `log` of `bnlab.watch`.

    Example:
        >>> from bnlab.integrations import accelerate  # doctest: +SKIP
        >>> with accelerate.watch(accelerator, model, optimizer) as watch:  # doctest: +SKIP
        ...     train()
    """
    if optimizer is None:
        optimizer = one_or_none(accelerator._optimizers)  # noqa: SLF001 - an Accelerator has no public name for them

    def log_to_trackers(values: Mapping[str, float], step: int) -> None:
        accelerator.log(values, step=step)  # its own signature does not show that it takes a step

    target = log_to_trackers if log == "auto" else log
    return watch_model(model, optimizer, scaler=scaler_in_use(accelerator.scaler), every=every, log=target)
