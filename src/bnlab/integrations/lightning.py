"""Watches a fit of Lightning's Trainer, and recalibrates before its validations and checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from bnlab.errors import MissingPackage
from bnlab.integrations.averaged import inside_average
from bnlab.integrations.kept_statistics import NAMES
from bnlab.integrations.recalibration import Target
from bnlab.integrations.training_callback import TrainingCallback, one_or_none
from bnlab.observe.discover import batch_norm_layers
from bnlab.watching.logs import EventCounts, TensorBoardWriter, event_text

__all__ = ["BnlabCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_STATISTICS = "bnlab_training_statistics"
"""The key in a checkpoint of the statistics with which a training goes on."""


def _callback_classes() -> tuple[type, ...]:
    """Return the class Callback of each package of Lightning that is in use, or else of one that is installed."""
    if not any(name in sys.modules for name in _PACKAGES):
        for name in _PACKAGES:
            with suppress(ImportError):
                importlib.import_module(name)
                break
    modules = [sys.modules.get(name) for name in _PACKAGES]
    classes = tuple(module.Callback for module in modules if module is not None)
    if not classes:
        raise MissingPackage(
            "bnlab.integrations.lightning: package must be installed, got none. Install it: pip install lightning"
        )
    return classes


_Callback: Any = type("_Callback", _callback_classes(), {})


class BnlabCallback(TrainingCallback, _Callback):  # type: ignore[misc] # the base is known when it is imported
    """A callback of Lightning's Trainer that watches the BN layers during a fit.

    The options are those of every callback of bnlab (`TrainingCallback`). `log="auto"` writes to the loggers of the
    Trainer. A `WeightAveraging` callback is recognised: its average is what is evaluated and saved.

    A checkpoint of `recalibrate_before="save"` has the recalibrated statistics in its state dict, and those of the
    training beside it, with which a fit that resumes from it goes on.

    Example:
        >>> from bnlab.integrations.lightning import BnlabCallback  # doctest: +SKIP
        >>> trainer = lightning.Trainer(callbacks=[BnlabCallback(recalibrate_before="validation")])  # doctest: +SKIP
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ANN401, ARG002 - Lightning's signature
        """Take a place behind the callbacks whose changes this one must see, and before those that save."""
        others = [callback for callback in trainer.callbacks if callback is not self]
        saving = [callback for callback in others if _saves(callback)]
        trainer.callbacks = [*(one for one in others if one not in saving), self, *saving]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401 - as above
        """Begin to watch: the sanity check is over."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.start_watch(pl_module, one_or_none(trainer.optimizers), scaler, _Loggers(trainer))

    def on_train_batch_start(self, trainer: Any, *_: object) -> None:  # noqa: ANN401 - as above
        """Expect the passes of StochasticWeightAveraging, which updates statistics without steps."""
        if getattr(trainer.fit_loop, "_skip_backward", False):
            self.expect_passes()

    def on_train_epoch_end(self, *_: object) -> None:
        """Expect no such passes any more."""
        self.expect_no_passes()

    def on_train_end(self, *_: object) -> None:
        """End the watch."""
        self.stop_watch()

    def on_exception(self, *_: object) -> None:
        """End the watch, and restore the statistics of the training."""
        self.stop_watch()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401 - as above
        """Recalibrate what is about to be evaluated."""
        if self.recalibrates_before("validation") and _trains(trainer):
            self.begin_recalibration(self._target(trainer, pl_module, optimizers=trainer.optimizers))

    def on_validation_end(self, *_: object) -> None:
        """Restore the statistics of the training."""
        self.end_recalibration()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ANN401
        """Put recalibrated statistics into a checkpoint, and those of the training beside them."""
        if not (self.recalibrates_before("save") and _trains(trainer)):
            return
        target = self._target(trainer, pl_module)
        keys = _keys(target) & checkpoint["state_dict"].keys()
        training = {key: checkpoint["state_dict"][key].clone() for key in keys}
        if not self.begin_recalibration(target):
            return
        try:
            now = inside_average(target.model).state_dict()
            new = {key: now[key].to(training[key].device, copy=True) for key in keys}
        finally:
            self.end_recalibration()
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **new}
        checkpoint[_STATISTICS] = training

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:  # noqa: ANN401
        """Go on with the statistics of the training."""
        training = checkpoint.get(_STATISTICS)
        if training and trainer.state.fn == "fit":
            average = _average(trainer)
            model = pl_module if average is None else inside_average(average)
            model.load_state_dict(training, strict=False)

    def _target(self, trainer: Any, pl_module: Any, optimizers: Any = ()) -> Target:  # noqa: ANN401 - as above
        average = _average(trainer)
        return Target(
            pl_module if average is None else average,
            self.data_or(trainer.train_dataloader),
            trained=None if average is None else pl_module,
            policy=self.options.averaged,
            optimizers=optimizers if average is None else (),
            convert=trainer.precision_plugin.convert_input,
            around=trainer.precision_plugin.forward_context,
            is_on_every_rank=True,
            step=trainer.global_step,
        )


class _Loggers:
    """Writes to all loggers of a Trainer, at its own count of steps."""

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401 - Lightning has no types here
        self._trainer = trainer
        self._events = EventCounts()

    def values(self, step: int, values: Mapping[str, float]) -> None:  # noqa: ARG002 - the Trainer counts steps itself
        """Write the values."""
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=self._trainer.global_step)

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:
        """Write how many events of this code there are, and the text where a logger takes texts."""
        key, count = self._events.add(code)
        self.values(step, {key: float(count)})
        for logger in self._trainer.loggers:
            writer = logger.experiment
            if isinstance(writer, TensorBoardWriter):
                writer.add_text(key, event_text(code, name, layer, message), self._trainer.global_step)


def _saves(callback: object) -> bool:
    return any(kind.__name__ == "Checkpoint" for kind in type(callback).__mro__)


def _trains(trainer: Any) -> bool:  # noqa: ANN401 - as above
    return bool(trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.train_dataloader is not None)


def _average(trainer: Any) -> Any:  # noqa: ANN401 - as above
    """Return the AveragedModel of a WeightAveraging callback that has averaged a step; None without one."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, torch.optim.swa_utils.AveragedModel):
            return average
    return None


def _keys(target: Target) -> set[str]:
    """Return the names of running statistics and counters in the state dict of a model."""
    layers = batch_norm_layers(inside_average(target.model))
    return {f"{path}.{name}" if path else name for path in layers for name in NAMES}
