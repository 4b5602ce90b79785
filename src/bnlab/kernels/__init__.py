"""The BN operators, and the choice of the backend that runs them."""

from bnlab.kernels.compiled import batch_norm_train, renorm_correction
from bnlab.kernels.dispatch import BACKENDS, Choice, choose
from bnlab.kernels.fixed_statistics import batch_norm_eval
from bnlab.kernels.request import Request

__all__ = ["BACKENDS", "Choice", "Request", "batch_norm_eval", "batch_norm_train", "choose", "renorm_correction"]
