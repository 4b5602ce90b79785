"""The BN operators and where they run."""

from bnlab.kernels.dispatch import BACKENDS, Choice, Request, choose
from bnlab.kernels.operators import batch_norm_eval, batch_norm_train, renorm_correction

__all__ = ["BACKENDS", "Choice", "Request", "batch_norm_eval", "batch_norm_train", "choose", "renorm_correction"]
