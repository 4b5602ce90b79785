"""Plans the fold of a BatchNormalization node: into the node before it, the one behind it, or a Mul and an Add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bnlab.remedies.fold_onnx.affine import into_affine
from bnlab.remedies.fold_onnx.batch_norm_node import BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold
from bnlab.remedies.fold_onnx.consumer import into_consumer
from bnlab.remedies.fold_onnx.producer import into_producer
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal, attempted

__all__ = ["plan"]

_ATTEMPTS: tuple[Callable[[BatchNormNode, Scope], Fold], ...] = (into_producer, into_consumer)


def plan(bn: BatchNormNode, scope: Scope, *, merges: bool = True) -> Fold:
    """Return the best possible fold of a BN.

    Args:
        bn: The BN.
        scope: The scope of its node.
        merges: Whether the BN may become Mul and Add. Later it might be folded, when other BN are.

    Raises:
        Refusal: If no fold is possible. It has all the reasons.
    """
    reasons: list[str] = []
    for attempt in (*_ATTEMPTS, *([into_affine] if merges else [])):
        fold = attempted(partial(attempt, bn, scope))
        if isinstance(fold, Fold):
            return fold
        reasons.append(fold.reason)
    raise Refusal("; ".join(dict.fromkeys(reasons)))
