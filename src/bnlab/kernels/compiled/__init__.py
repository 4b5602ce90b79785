"""The operators of torch.library. Compilers and exporters see each of them as one node.

Every import of this package registers them again and replaces what an interrupted import left behind.
"""

from bnlab.kernels.compiled import activated_train as _activated
from bnlab.kernels.compiled import batch_norm_train as _plain
from bnlab.kernels.compiled import kind_of_pass as _kind
from bnlab.kernels.compiled import running_statistics as _running
from bnlab.kernels.compiled.activated_train import batch_norm_activated_train
from bnlab.kernels.compiled.batch_norm_train import batch_norm_train
from bnlab.kernels.compiled.kind_of_pass import KindOfPass, is_in_backward, kind_of_compiled_pass, kind_of_pass
from bnlab.kernels.compiled.running_statistics import copied, renorm_correction
from bnlab.kernels.registration import fresh_library

__all__ = [
    "KindOfPass",
    "batch_norm_activated_train",
    "batch_norm_train",
    "copied",
    "is_in_backward",
    "kind_of_compiled_pass",
    "kind_of_pass",
    "renorm_correction",
]

_LIBRARY = fresh_library("bnlab")
for _operators in (_plain, _activated, _running, _kind):
    _operators.register(_LIBRARY)
