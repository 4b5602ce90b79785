"""Watches a training of ultralytics, and recalibrates before its validations and checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from bnlab.integrations.recalibration import Target
from bnlab.integrations.training_callback import TrainingCallback
from bnlab.observe.wrappers import unwrapped
from bnlab.uninterrupted import restores
from bnlab.watching.logs import Log, log_of

__all__ = ["BnlabCallback"]

_IMAGES = ("buffer", "ims", "im_hw0", "im_hw")
"""The lists of a data set that reading an image changes."""


class BnlabCallback(TrainingCallback):
    """Callbacks of ultralytics that watch the BN layers during a training.

    The options are those of every callback of bnlab (`TrainingCallback`). `log="auto"` writes to TensorBoard, where
    `yolo settings tensorboard=True` switches it on. What ultralytics evaluates and saves is an average of the weights,
    with averages of the running statistics, but with the counters from before the training.

    Example:
        >>> from bnlab.integrations.ultralytics import BnlabCallback  # doctest: +SKIP
        >>> callback = BnlabCallback(recalibrate_before=("validation", "save")).add_to(model)  # doctest: +SKIP
        >>> model.train(data="coco8.yaml")  # doctest: +SKIP
    """

    _trainer: Any = None
    _optimizer: Any = None
    _loader: DataLoader[Any] | None = None

    @property
    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """The functions by the name of their event."""
        return {
            "on_train_start": self.on_train_start,
            "on_train_epoch_start": self.on_train_epoch_start,
            "on_train_epoch_end": self.on_train_epoch_end,
            "on_val_start": self.on_val_start,
            "on_val_end": self.on_val_end,
            "on_fit_epoch_end": self.on_fit_epoch_end,
            "on_train_end": self.on_train_end,
            "teardown": self.on_train_end,
        }

    def add_to(self, target: Any) -> BnlabCallback:  # noqa: ANN401 - a YOLO or a trainer
        """Add the functions to a YOLO, or to a trainer, and return this callback."""
        for event, function in self.callbacks.items():
            target.add_callback(event, function)
        return self

    def on_train_start(self, trainer: Any) -> None:  # noqa: ANN401 - a trainer
        """Begin to watch."""
        self._trainer, self._optimizer = trainer, trainer.optimizer
        self.start_watch(trainer.model, trainer.optimizer, trainer.scaler, _tensorboard())

    def on_train_epoch_start(self, trainer: Any) -> None:  # noqa: ANN401 - a trainer
        """Restore the statistics of the average, and watch the optimizer that takes the place of another one."""
        self.end_recalibration()
        if trainer.optimizer is not self._optimizer:  # it begins anew with smaller batches after it ran out of memory
            self.on_train_start(trainer)

    def on_train_epoch_end(self, _trainer: Any) -> None:  # noqa: ANN401 - a trainer
        """Recalibrate for the checkpoint that follows."""
        self._recalibrate(wanted=self.recalibrates_before("save"))

    def on_val_start(self, validator: Any) -> None:  # noqa: ANN401 - a validator
        """Recalibrate what is about to be evaluated."""
        if validator.training:
            self._recalibrate(wanted=self.recalibrates_before("validation"))

    def on_val_end(self, validator: Any) -> None:  # noqa: ANN401 - a validator
        """Recalibrate for the checkpoint that follows, or restore the statistics of the average."""
        if validator.training:
            self._recalibrate(wanted=self.recalibrates_before("save"))

    def on_fit_epoch_end(self, _trainer: Any) -> None:  # noqa: ANN401 - a trainer
        """Restore the statistics of the average: the checkpoint is saved."""
        self.end_recalibration()

    def on_train_end(self, _trainer: Any) -> None:  # noqa: ANN401 - a trainer
        """End the watch."""
        self.stop_watch()
        self._trainer = self._optimizer = self._loader = None

    def _recalibrate(self, *, wanted: bool) -> None:
        """Give the average its statistics, or restore those it had."""
        self.end_recalibration()
        trainer = self._trainer
        if trainer is None or not wanted:
            return
        target = Target(
            trainer.ema.ema if trainer.ema else unwrapped(trainer.model),
            self.data_or(self._training_data(trainer.train_loader)),
            trained=unwrapped(trainer.model) if trainer.ema else None,
            policy=self.options.averaged,
            convert=trainer.preprocess_batch if self.options.batches is None else None,
            around=partial(_images_kept, trainer.train_loader.dataset),
            step=trainer.epoch,
        )
        self.begin_recalibration(target)

    def _training_data(self, loader: Any) -> DataLoader[Any]:  # noqa: ANN401 - a loader of ultralytics
        """Return a loader of the training data, the same one as long as they are the same."""
        if self._loader is None or self._loader.dataset is not loader.dataset:
            self._loader = _apart(loader)
        return self._loader


def _apart(loader: Any) -> DataLoader[Any]:  # noqa: ANN401 - a loader of ultralytics
    """Return a loader of the same data apart from one of ultralytics, whose only iterator never ends."""
    sampler = loader.batch_sampler
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler.sampler if type(sampler).__name__ == "_RepeatSampler" else sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
    )


@restores
def _images_kept(dataset: object) -> Iterator[None]:
    """Restore the images that a data set has in memory: without workers, its mosaics are made of them."""
    lists = [value for name in _IMAGES if isinstance(value := getattr(dataset, name, None), list)]
    old = [[*value] for value in lists]
    try:
        yield
    finally:
        for value, items in zip(lists, old, strict=True):
            value[:] = items


def _tensorboard() -> Log | None:
    """Return the TensorBoard of ultralytics; None where it is off."""
    module = sys.modules.get("ultralytics.utils.callbacks.tensorboard")
    writer = getattr(module, "WRITER", None)
    return None if writer is None else log_of(writer)
