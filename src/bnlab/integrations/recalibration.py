"""Gives a model recalibrated statistics for a while, such as for a validation, and restores those of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnlab.integrations.averaged import (
    Policy,
    copy_counters,
    copy_statistics,
    inside_average,
    require_averaged_buffers,
)
from bnlab.integrations.evaluation_weights import evaluation_weights, is_in_train_mode
from bnlab.integrations.kept_statistics import KeptStatistics, buffers_of
from bnlab.integrations.loaders import apart, generators_kept
from bnlab.integrations.options import DEFAULT_BATCHES, require_policy, settings_of
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.passes.calling import Forward
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.kept_batches import require_data
from bnlab.remedies.recalibrate import RecalibrationSettings, recalibrate_with
from bnlab.uninterrupted import restores

__all__ = ["Recalibration", "Target", "recalibrated"]


@restores
def recalibrated(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    trained: nn.Module | None = None,
    averaged: Policy = "recompute",
    optimizer: torch.optim.Optimizer | None = None,
    max_batches: int | None = DEFAULT_BATCHES,
    standard_error: float | None = None,
    forward: Forward | None = None,
) -> Iterator[None]:
    """Give a model recalibrated running statistics inside a block, and restore every bit of the old ones after it.

    Validate a model or save a checkpoint inside the block. The training goes on as if nothing had happened: weights,
    statistics, counters and random numbers are those from before, and the loader can be the one that trains.

    Args:
        model: The model that is evaluated or saved: the one that trains, or an average of its weights.
        batches: Training data, as for `bnlab.recalibrate`.
        trained: The model that trains, where `model` is an average of it.
        averaged: What an average gets: "recompute" recalibrates it, "copy" writes the statistics of `trained` into it,
            and "average" leaves the averages of the statistics in it and mends the counters, which averages get wrong.
        optimizer: The optimizer. One of `schedulefree` has other weights to evaluate with, which the recalibration then
            uses, also while the optimizer is in train mode.
        max_batches: The number of batches to read at most; None for all.
        standard_error: The standard error that is small enough, as for `bnlab.recalibrate`.
        forward: A function forward(model, batch), for models that cannot be called on the batch directly.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is invalid, or the recalibration is impossible.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> loader = [torch.randn(32, 4) + 3 for _ in range(4)]
        >>> with bnlab.integrations.recalibrated(model, loader):
        ...     output = model.eval()(loader[0])
        >>> model[1].running_mean.count_nonzero()
        tensor(0)
    """
    target = Target(
        model,
        require_data("batches", batches),
        trained=trained,
        policy=require_policy("recalibrated", averaged),
        optimizers=() if optimizer is None else (optimizer,),
    )
    recalibration = Recalibration(settings_of(max_batches, standard_error, forward))
    try:
        recalibration.begin(target)
        yield
    finally:
        recalibration.end()


@dataclass(frozen=True, eq=False)
class Target:
    """What gets statistics, and how.

    Attributes:
        model: The model that is evaluated or saved.
        batches: Training data, or the loader that a framework trains with.
        trained: The model that trains, where `model` is an average of it.
        policy: What an average gets.
        optimizers: Optimizers whose evaluation weights count. None for the weights as they are.
        convert: What the framework does to a batch before the model gets it; None for nothing.
        around: Returns the context in which the framework runs the model, such as autocast.
        is_on_every_rank: Whether every rank recalibrates at this time, so that all can use the statistics of the first.
        step: The step, so that two recalibrations in one step need one pass over the data.
    """

    model: nn.Module
    batches: Any
    trained: nn.Module | None = None
    policy: Policy = "recompute"
    optimizers: Sequence[Any] = ()
    convert: Callable[[Any], Any] | None = None
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    is_on_every_rank: bool = False
    step: int | None = None


class Recalibration:
    """Recalibrated statistics that a model has from `begin` to `end`.

    Args:
        settings: How to recalibrate.
    """

    def __init__(self, settings: RecalibrationSettings) -> None:
        self._settings = settings
        self._before: KeptStatistics | None = None
        self._latest: tuple[tuple[object, ...], KeptStatistics] | None = None

    @property
    def is_active(self) -> bool:
        """Whether a model has recalibrated statistics now."""
        return self._before is not None

    def begin(self, target: Target) -> None:
        """Give a model its statistics. What an earlier call has changed is restored first.

        Raises:
            NoBatchNorm: If there is no BN layer.
            UsageError: If the recalibration is impossible. The model is then as before.
        """
        self.end()
        # A framework may validate under torch.inference_mode, whose tensors could not be used in training again.
        with torch.inference_mode(mode=False), torch.no_grad():
            before = KeptStatistics(target.model)
            try:
                self._apply(target)
            except BaseException:
                before.restore()
                raise
        self._before = before

    def end(self) -> None:
        """Restore the statistics from before `begin`. A second call does nothing."""
        before, self._before = self._before, None
        if before is not None:
            with torch.inference_mode(mode=False):
                before.restore()

    def _apply(self, target: Target) -> None:
        if target.trained is not None and target.policy == "copy":
            copy_statistics(target.model, target.trained)
        elif target.trained is not None and target.policy == "average":
            require_averaged_buffers(target.model)
            copy_counters(target.model, target.trained)
        else:
            self._recompute(target)

    def _recompute(self, target: Target) -> None:
        with evaluation_weights(target.optimizers):
            key = _key(target)
            if self._latest is not None and key is not None and self._latest[0] == key:
                self._latest[1].restore()
                return
            self._latest = None
            with generators_kept(target.batches), target.around():
                batches = apart(target.batches)
                if target.convert is not None:
                    batches = _Converted(batches, target.convert)
                _recalibrate(inside_average(target.model), batches, self._settings)
        if target.is_on_every_rank:
            _take_those_of_the_first_rank(target.model)
        if key is not None:
            self._latest = key, KeptStatistics(target.model)


class _Converted:
    """Batches as a framework passes them to the model."""

    def __init__(self, batches: Iterable[Any], convert: Callable[[Any], Any]) -> None:
        self._batches, self._convert = batches, convert

    def __iter__(self) -> Iterator[Any]:
        return map(self._convert, self._batches)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return the attribute of the data itself, such as the sampler of a loader."""
        if name.startswith("_"):
            raise AttributeError(f"{name!r} is not known of converted batches")
        return getattr(self._batches, name)


@one_at_a_time("recalibrate")
def _recalibrate(model: nn.Module, batches: Iterable[Any], settings: RecalibrationSettings) -> None:
    recalibrate_with(model, batches, settings)


def _key(target: Target) -> tuple[object, ...] | None:
    """Return what the statistics depend on; None where that is not known."""
    parameters = [*target.model.parameters()]
    if target.step is None or any(parameter.is_inference() for parameter in parameters):
        return None
    modes = [is_in_train_mode(one) for one in target.optimizers]
    versions = sum(parameter._version for parameter in parameters)  # noqa: SLF001 - torch has no public name for it
    return target.step, id(target.model), id(target.batches), versions, *modes


def _take_those_of_the_first_rank(model: nn.Module) -> None:
    """Give every rank the statistics of the first one, as DistributedDataParallel does before a forward pass."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for layer in batch_norm_layers(model).values():
            for _, buffer in buffers_of(layer):
                distributed.broadcast(buffer, src=0)
