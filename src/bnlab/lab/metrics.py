"""Metrics of a classifier on labelled batches. Each is one number, and higher is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnlab.errors import UsageError
from bnlab.observe.metric import Metric
from bnlab.observe.named_metrics import NAMES, accuracy, cross_entropy, miou
from bnlab.observe.passes.calling import Forward, run_batch
from bnlab.wording import did_you_mean

__all__ = ["NAMES", "Metric", "accuracy", "load", "loss", "miou"]


def loss(
    model: nn.Module, data: Iterable[Any], *, ignore_index: int | None = None, forward: Forward = run_batch
) -> float:
    """Return minus the mean cross-entropy in nats: at most 0, and higher is better. It is nan if a score is nan.

    ``metric="loss"`` stands for the cross-entropy itself, of which a lower value is better.

    Args:
        model: As for `accuracy`. Its scores are logits.
        data: As for `accuracy`.
        ignore_index: As for `accuracy`.
        forward: As for `accuracy`.

    Raises:
        UsageError: As for `accuracy`.

    Example:
        >>> from torch import nn, tensor
        >>> round(loss(nn.Identity(), [(tensor([[0.0, 0.0]]), tensor([1]))]), 4)
        -0.6931
    """
    return -cross_entropy(model, data, ignore_index=ignore_index, forward=forward)


loss.higher_is_better = True  # type: ignore[attr-defined]  # its name says the opposite
loss.takes_forward = True  # type: ignore[attr-defined]  # check and repair pass that of the caller

_METRICS: dict[str, Callable[..., float]] = {"accuracy": accuracy, "loss": loss, "miou": miou}


def load(name: str) -> Metric:
    """Return the metric of a name in `NAMES`, with the sign with which higher is better.

    Raises:
        UsageError: If there is no metric of this name.
    """
    if name not in _METRICS:
        raise UsageError(
            f"metrics: name must be one of {', '.join(NAMES)}, got {name!r}.{did_you_mean(str(name), NAMES)}"
        )
    return _METRICS[name]
