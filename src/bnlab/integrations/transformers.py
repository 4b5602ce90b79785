"""Watches a training of transformers' Trainer, and recalibrates before its evaluations and checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from bnlab.errors import MissingPackage
from bnlab.integrations.recalibration import Target
from bnlab.integrations.training_callback import TrainingCallback
from bnlab.watching.logs import EventCounts, event_text

__all__ = ["BnlabCallback"]


def _callback_class() -> type:
    try:
        return importlib.import_module("transformers.trainer_callback").TrainerCallback  # type: ignore[no-any-return]
    except ImportError:
        raise MissingPackage(
            "bnlab.integrations.transformers: package must be installed, got none. Install it: pip install transformers"
        ) from None


_Callback: Any = _callback_class()


class BnlabCallback(TrainingCallback, _Callback):  # type: ignore[misc] # the base is known when it is imported
    """A callback of transformers' Trainer that watches the BN layers during a training.

    The options are those of every callback of bnlab (`TrainingCallback`). `log="auto"` writes to what `report_to`
    names. Statistics are recalibrated before the evaluations and checkpoints of a training, not in calls of
    `trainer.evaluate()` by hand. A training that resumes from a checkpoint of `recalibrate_before="save"` begins with
    the recalibrated statistics.

    Example:
        >>> from bnlab.integrations.transformers import BnlabCallback  # doctest: +SKIP
        >>> trainer = transformers.Trainer(model, arguments, callbacks=[BnlabCallback()])  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:  # noqa: ANN401
        """Begin to watch."""
        optimizer = keywords["optimizer"]
        log = _Reporters(_reporters(self), args, state, control, keywords["model"])
        self.start_watch(keywords["model"], optimizer, getattr(optimizer, "scaler", None), log)

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Restore the statistics of the training."""
        self.end_recalibration()

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        """Restore the statistics of the training."""
        self.end_recalibration()

    def on_step_end(self, _args: Any, state: Any, control: Any, **keywords: Any) -> None:  # noqa: ANN401
        """Recalibrate for the evaluation or checkpoint that follows."""
        self._prepare(state, control, keywords)

    def on_epoch_end(self, _args: Any, state: Any, control: Any, **keywords: Any) -> None:  # noqa: ANN401
        """Recalibrate for the evaluation or checkpoint that follows."""
        self._prepare(state, control, keywords)

    def on_evaluate(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:  # noqa: ANN401
        """Restore the statistics of the training, or recalibrate for the checkpoint that follows."""
        self.end_recalibration()
        follows = control.should_save or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
        if follows and self.is_training and self.recalibrates_before("save"):
            self._begin(state, keywords, for_evaluation=False)

    def on_save(self, *_: object, **__: object) -> None:
        """Restore the statistics of the training."""
        self.end_recalibration()

    def on_train_end(self, *_: object, **__: object) -> None:
        """End the watch."""
        self.stop_watch()

    def _prepare(self, state: Any, control: Any, keywords: Mapping[str, Any]) -> None:  # noqa: ANN401
        if control.should_evaluate:
            if self.recalibrates_before("validation"):
                self._begin(state, keywords, for_evaluation=True)
        elif control.should_save and self.recalibrates_before("save"):
            self._begin(state, keywords, for_evaluation=False)

    def _begin(self, state: Any, keywords: Mapping[str, Any], *, for_evaluation: bool) -> None:  # noqa: ANN401
        """Recalibrate. The Trainer evaluates with the weights that schedule-free optimizers have in eval mode."""
        target = Target(
            keywords["model"],
            self.data_or(keywords["train_dataloader"]),
            optimizers=(keywords["optimizer"],) if for_evaluation else (),
            is_on_every_rank=True,
            step=state.global_step,
        )
        self.begin_recalibration(target)


class _Reporters:
    """Writes to the callbacks of a Trainer that report to TensorBoard and other trackers.

    They get the values as those that the Trainer logs. They are called directly, because a log of the Trainer would
    print the values of all layers and end its own interval.
    """

    def __init__(self, reporters: Sequence[Any], args: Any, state: Any, control: Any, model: Any) -> None:  # noqa: ANN401
        self._reporters = reporters
        self._args, self._state, self._control, self._model = args, state, control, model
        self._events = EventCounts()

    def values(self, step: int, values: Mapping[str, float]) -> None:  # noqa: ARG002 - the Trainer counts steps itself
        """Write the values."""
        self._report(values)

    def event(self, step: int, code: str, name: str, layer: str, message: str) -> None:  # noqa: ARG002 - as above
        """Write how many events of this code there are, and the text where a tracker takes texts."""
        key, count = self._events.add(code)
        self._report({key: float(count)})
        for reporter in self._reporters:
            writer = getattr(reporter, "tb_writer", None)
            if writer is not None:
                writer.add_text(key, event_text(code, name, layer, message), self._state.global_step)

    def _report(self, values: Mapping[str, float]) -> None:
        for reporter in self._reporters:
            if getattr(reporter, "tb_writer", self) is not None:  # a writer that is closed would begin another file
                reporter.on_log(self._args, self._state, self._control, logs=dict(values), model=self._model)


def _reporters(callback: object) -> list[Any]:
    """Return the callbacks beside one that report to trackers.

    A callback gets no reference to the Trainer or its other callbacks: they are those of the caller.
    """
    integrations = importlib.import_module("transformers.integrations.integration_utils")
    kinds = tuple(integrations.INTEGRATION_TO_CALLBACK.values())
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the callers
    while frame is not None:
        callbacks = getattr(frame.f_locals.get("self"), "callbacks", None)
        if isinstance(callbacks, list) and callback in callbacks:
            return [one for one in callbacks if isinstance(one, kinds)]
        frame = frame.f_back
    return []
