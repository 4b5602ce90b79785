"""Holds what a caller passes to observe a model: an example, data, a metric, a loss, an optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import BnlabWarning, UsageError
from bnlab.observe.losses import mean_loss
from bnlab.observe.metric import Metric, Score
from bnlab.observe.named_metrics import score_of
from bnlab.observe.passes.calling import Batch, Forward, require_forward, run_batch
from bnlab.observe.passes.example import example_of
from bnlab.observe.passes.kept_batches import KeptBatches, MaxBatches, keep, require_data, require_max_batches

__all__ = ["Inputs"]

_LOWER_IS_BETTER = re.compile(r"loss|error|perplexity|(?<![a-z])(r?mse|mae)(?![a-z])")
"""Finds the names of metrics of which a lower value is better."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs with which a model is observed. All of them are optional.

    Attributes:
        data: Batches of the data that the model will see.
        train_data: Batches of the data on which the model was trained.
        metric: metric(model, data) -> float, or the name of a metric.
        lower_is_better: Whether a lower metric is better.
        example: One batch, or data of which the first batch is used; None for the first batch of `data`.
        loss: loss(model, batch) -> scalar.
        optimizer: The optimizer that trains the model.
        forward: forward(model, batch) -> output, which calls the model on a batch.
        infers_eps: Whether to look for the eps of the training also where the statistics fit the data.
        max_batches: How many batches of each data set are used, as for :func:`keep`.
        advance: Called after every batch with the name of the current step.
    """

    data: Iterable[Any] | None = None
    train_data: Iterable[Any] | None = None
    metric: Metric | str | None = None
    lower_is_better: bool = False
    example: Batch = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    forward: Forward = run_batch
    infers_eps: bool = False
    max_batches: MaxBatches = "auto"
    advance: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        for name in ("data", "train_data"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, require_data(name, value))
        if self.data is None and (self.train_data is not None or self.metric is not None or self.loss is not None):
            raise UsageError("check: data must be given with train_data, metric or loss, got none.")
        for name in ("metric", "loss"):
            value = getattr(self, name)
            if value is not None and not callable(value) and not (name == "metric" and isinstance(value, str)):
                raise UsageError(f"{name}: it must be callable, got {type(value).__name__}.")
        require_forward("check", self.forward)
        require_max_batches(self.max_batches)
        self._warn_of_direction()

    def _warn_of_direction(self) -> None:
        """Warn of a metric whose name says that lower is better, and which is read the other way round."""
        score = None if self.metric is None else self.score
        if score is None or score.lower_is_better or getattr(self.metric, "higher_is_better", False):
            return
        if isinstance(self.data, KeptBatches):  # inputs that were read have warned before
            return
        if _LOWER_IS_BETTER.search(score.name.lower()):
            warnings.warn(
                f"metric: {score.name} is read as higher is better, although its name says the opposite. Pass "
                "lower_is_better=True, or --minimize on the command line.",
                BnlabWarning,
                stacklevel=6,
            )

    @property
    def score(self) -> Score | None:
        """The metric with its direction, or the mean loss where there is no metric; None with neither."""
        if self.metric is not None:
            return score_of(self.metric, lower_is_better=self.lower_is_better, forward=self.forward)
        return None if self.loss is None else mean_loss(self.loss)

    @property
    def example_or_first_batch(self) -> Batch:
        """The example, or else the first batch of `data`; None with neither."""
        return self.example if self.data is None or self.example is not None else next(iter(self.data))

    def read(self) -> Inputs:
        """Read each data set once, and return these inputs with one example and the batches held in memory."""
        data = None if self.data is None else keep("data", self.data, self.max_batches)
        train_data = None if self.train_data is None else keep("train_data", self.train_data, self.max_batches)
        return replace(self, data=data, train_data=train_data, example=example_of(self.example))
