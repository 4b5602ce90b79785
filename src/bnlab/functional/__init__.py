"""The reference for BN: pure tensor functions in float64 that are readable and differentiable."""

from bnlab.functional.batch_norm import batch_norm
from bnlab.functional.folding import fold_into_consumer, fold_into_producer, scale_and_shift
from bnlab.functional.moments import Moments, batch_moments, merge, population_moments
from bnlab.functional.renorm import renorm_correction
from bnlab.functional.running import (
    debias,
    effective_batches,
    moving_average,
    updates_to_forget,
)
from bnlab.functional.streaming import StreamingMoments
from bnlab.functional.transform import batch_norm_backward, normalize

__all__ = [
    "Moments",
    "StreamingMoments",
    "batch_moments",
    "batch_norm",
    "batch_norm_backward",
    "debias",
    "effective_batches",
    "fold_into_consumer",
    "fold_into_producer",
    "merge",
    "moving_average",
    "normalize",
    "population_moments",
    "renorm_correction",
    "scale_and_shift",
    "updates_to_forget",
]
