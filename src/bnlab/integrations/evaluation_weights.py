"""The weights that schedule-free optimizers evaluate with, which are others than those they train with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnlab.uninterrupted import restores

__all__ = ["evaluation_weights", "is_in_train_mode"]


@restores
def evaluation_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """Put the weights in place that schedule-free optimizers evaluate with, and restore every bit after the block.

    `optimizer.eval()` and `optimizer.train()` alone restore the weights up to rounding. An optimizer that is in eval
    mode, or has no modes, stays as it is.

    Args:
        optimizers: Optimizers, of any kind.

    Source:
        Defazio et al. 2024, The Road Less Scheduled (arXiv:2405.15682): the training sequence y, and its average x.
    """
    training = [optimizer for optimizer in optimizers if _has_modes(optimizer) and is_in_train_mode(optimizer)]
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for optimizer in training:
            kept += [(one, one.detach().clone()) for group in optimizer.param_groups for one in group["params"]]
            optimizer.eval()
        yield
    finally:
        for optimizer in training:
            optimizer.train()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _has_modes(optimizer: Any) -> bool:  # noqa: ANN401 - an optimizer of any kind
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def is_in_train_mode(optimizer: Any) -> bool:  # noqa: ANN401 - as above
    """Return whether a schedule-free optimizer is in train mode: its groups say so, or a wrapper round it."""
    groups = getattr(optimizer, "param_groups", ())
    return any(group.get("train_mode") is True for group in groups) or getattr(optimizer, "train_mode", None) is True
