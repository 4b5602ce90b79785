"""What the callbacks of all frameworks do: they watch a run, and recalibrate before validations and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bnlab.errors import BnlabError, BnlabWarning, UsageError
from bnlab.integrations.averaged import Policy
from bnlab.integrations.options import DEFAULT_BATCHES, Moment, Options
from bnlab.integrations.recalibration import Recalibration, Target
from bnlab.observe.passes.calling import Forward
from bnlab.watching.events import Event
from bnlab.watching.logs import Log, LogTarget
from bnlab.watching.watch import Watch, watch

if TYPE_CHECKING:
    from bnlab.diagnosis.check import Diagnosis

__all__ = ["TrainingCallback", "one_or_none", "scaler_in_use"]


class TrainingCallback:
    """The part of a callback that knows no framework.

    Args:
        every: Number of steps from one sample of the statistics to the next.
        log: "auto" for the logger of the framework, None, or a `log` of `bnlab.watch`.
        recalibrate_before: "validation", "save" or both in a tuple: the running statistics are recalibrated before it
            with the weights that are evaluated or saved, and restored after it.
        averaged: What an averaged model gets then: "recompute" recalibrates it, "copy" writes the statistics of the
            model that trains into it, and "average" leaves the averages of the statistics in it and mends the counters.
        batches: The data of a recalibration, as for `bnlab.recalibrate`; None for the training data of the framework.
        max_batches: The number of batches that a recalibration reads at most; None for all.
        standard_error: The standard error that is small enough, as for `bnlab.recalibrate`.
        forward: A function forward(model, batch), for models that cannot be called on the batch directly.

    Attributes:
        watch: The watch of the latest training; None before the first one.
        is_training: Whether a training runs.

    Raises:
        UsageError: If an argument is invalid.
        UnwritableFile: If `log` is the path of a file that cannot be written.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        log: LogTarget = "auto",
        recalibrate_before: Moment | Collection[Moment] | None = None,
        averaged: Policy = "recompute",
        batches: Any = None,  # noqa: ANN401 - data of any form
        max_batches: int | None = DEFAULT_BATCHES,
        standard_error: float | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        self.options = Options.of(
            every=every,
            log=log,
            recalibrate_before=recalibrate_before,
            averaged=averaged,
            batches=batches,
            max_batches=max_batches,
            standard_error=standard_error,
            forward=forward,
        )
        self.watch: Watch | None = None
        self._recalibration = Recalibration(self.options.settings)
        self._expected = ExitStack()
        self._has_recalibrated = False
        self.is_training = False

    @property
    def events(self) -> tuple[Event, ...]:
        """The events of the latest training."""
        return () if self.watch is None else self.watch.events

    def report(self) -> Diagnosis:
        """Return the diagnosis of the latest training, as `Watch.report` does.

        Raises:
            UsageError: If no training has begun.
        """
        if self.watch is None:
            raise UsageError("BnlabCallback: report must follow a training, got none. Train the model first.")
        return self.watch.report()

    def start_watch(self, model: nn.Module, optimizer: Any, scaler: Any, log: Log | None) -> None:  # noqa: ANN401
        """Begin to watch a training.

        Args:
            model: The model that trains.
            optimizer: Its optimizer; None for every one that has parameters of the model.
            scaler: The gradient scaler of the framework, or None.
            log: The logger of the framework, or None.
        """
        self.stop_watch()
        target = log if self.options.log == "auto" else self.options.log
        self.watch = watch(model, optimizer, scaler=scaler_in_use(scaler), every=self.options.every, log=target)
        self.watch.start()
        self.is_training = True

    def stop_watch(self) -> None:
        """End the watch, and restore what a recalibration has changed. A second call does nothing."""
        self.is_training = False
        self._expected.close()
        self._recalibration.end()
        if self.watch is not None:
            self.watch.stop()

    def expect_passes(self) -> None:
        """Declare the forward passes up to `expect_no_passes` ones that may update statistics without a step."""
        if self.watch is not None:
            self._expected.close()
            self._expected.enter_context(self.watch.expected())

    def expect_no_passes(self) -> None:
        """End what `expect_passes` has begun."""
        self._expected.close()

    def begin_recalibration(self, target: Target) -> bool:
        """Give a model its statistics, and return whether it has them.

        The first time an error is raised: the options are wrong. Later it becomes a warning, and the model keeps its
        statistics, because a long run must not end for it.

        Raises:
            BnlabError: If the first recalibration is impossible.
        """
        try:
            self._recalibration.begin(target)
        except BnlabError as error:
            if not self._has_recalibrated:
                raise
            warnings.warn(
                f"BnlabCallback: model must allow a recalibration, got an error, and keeps its statistics: {error}",
                BnlabWarning,
                stacklevel=2,
            )
            return False
        self._has_recalibrated = True
        return True

    def end_recalibration(self) -> None:
        """Restore the statistics from before. A second call does nothing."""
        self._recalibration.end()

    def recalibrates_before(self, moment: Moment) -> bool:
        """Return whether statistics are recalibrated before a validation, or before a checkpoint is saved."""
        return moment in self.options.recalibrate_before

    def data_or(self, loader: Any) -> Any:  # noqa: ANN401 - data of any form
        """Return the data of a recalibration: those of the options, or the training loader.

        Raises:
            UsageError: If there are none.
        """
        data = loader if self.options.batches is None else self.options.batches
        several = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
        if data is None or any(isinstance(one, DataLoader) for one in several):
            got = "none" if data is None else "several loaders"
            raise UsageError(
                f"BnlabCallback: batches must be known for a recalibration, got {got}. Pass batches=loader."
            )
        return data


def scaler_in_use(scaler: Any) -> Any:  # noqa: ANN401 - a scaler of any kind
    """Return a gradient scaler that may skip steps; None where there is none, or a disabled one."""
    is_enabled = getattr(scaler, "is_enabled", None)
    return scaler if callable(is_enabled) and is_enabled() else None


def one_or_none(optimizers: Collection[Any]) -> Any:  # noqa: ANN401 - an optimizer of any kind
    """Return the only optimizer of torch; None where there are several, or one of another kind."""
    only = next(iter(optimizers)) if len(optimizers) == 1 else None
    return only if isinstance(only, torch.optim.Optimizer) else None
