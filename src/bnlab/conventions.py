"""Translates names and numbers between frameworks.

In bnlab ``momentum`` is torch's: the weight of the *new* batch in the running statistics, ``None`` for a cumulative
average. Keras, Flax and ONNX store the weight of the *old* value instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

__all__ = [
    "FEW_VALUES",
    "FEW_VALUES_SOURCE",
    "LARGE_MOMENTUM",
    "NAMES_IN_WRAPPERS",
    "SETTLED_WEIGHT",
    "TORCH_EPS",
    "TORCH_MOMENTUM",
    "WRAPPER_PREFIXES",
    "bare_names",
    "from_float32",
    "momentum_from_decay",
    "momentum_of_updates",
    "noise_of_average",
    "wrapper_prefix",
]

SETTLED_WEIGHT = 0.01
"""Weight of the initial values in a moving average below which it counts as settled."""

LARGE_MOMENTUM = 0.5
"""Momentum above which the running statistics are those of one or two batches."""

FEW_VALUES = 16
"""Values per channel in a batch below which batch statistics are noise."""

FEW_VALUES_SOURCE = "the mean gain is 9 % too high for 16 normal values, 20 % for 8, 60 % for 4"
"""Where this number comes from."""

TORCH_MOMENTUM = 0.1
"""Default ``momentum`` of ``torch.nn.BatchNorm*d``: weight of the new batch."""

TORCH_EPS = 1e-5
"""Default ``eps`` of ``torch.nn.BatchNorm*d``, in squared input units."""

WRAPPER_PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "_forward_module."),
    *("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
)
"""Prefixes that DataParallel and DDP, `torch.compile`, FSDP, activation checkpointing and common trainers add to every
name of a state dict."""

NAMES_IN_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
"""The name under which each class that torch puts around a model holds that model. Half of them are slow to import."""

_INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Wrappers whose names have no other meaning, so that they count as such in the middle of a name too."""

_FLOAT32_DIGITS = 6


def wrapper_prefix(names: Collection[str], model_names: Collection[str] = ()) -> str:
    """Return the prefix that wrappers add to every name of a state dict.

    A prefix counts only if every name in the state dict has it and no name in the model does, because a model may have
    a submodule called ``net``. Wrappers may be nested.

    Args:
        names: The names of the tensors in the state dict.
        model_names: The names in the model that the state dict belongs to, if the model is known.

    Returns:
        One prefix, or several in a row; "" if there is none.

    Example:
        >>> wrapper_prefix(["module.net.bn.weight", "module.net.bn.bias"])
        'module.net.'
        >>> wrapper_prefix(["module.net.bn.weight", "module.net.bn.bias"], ["net.bn.weight", "net.bn.bias"])
        'module.'
    """
    if not names:
        return ""
    possible = [prefix for prefix in WRAPPER_PREFIXES if not any(name.startswith(prefix) for name in model_names)]
    first, last = min(names), max(names)  # what these two begin with, all names between them begin with
    end = 0
    while prefix := next((one for one in possible if first.startswith(one, end) and last.startswith(one, end)), ""):
        end += len(prefix)
    return first[:end]


def bare_names(names: Collection[str], model_names: Collection[str] = ()) -> dict[str, str]:
    """Return the names of a state dict without what wrappers put into them.

    Apart from the prefix of all names (`wrapper_prefix`), the parts that FSDP, activation checkpointing and
    `torch.compile` put into the middle of names are dropped, unless the model has them too, or two names would become
    one.

    Args:
        names: The names of the tensors in the state dict.
        model_names: The names in the model that the state dict belongs to, if the model is known.

    Returns:
        The names in the model by the names in the state dict.

    Example:
        >>> bare_names(["module.bn.bias", "module.layer1._checkpoint_wrapped_module.bn.bias"])
        {'module.bn.bias': 'bn.bias', 'module.layer1._checkpoint_wrapped_module.bn.bias': 'layer1.bn.bias'}
    """
    inner = [part for part in _INNER_WRAPPERS if not any(part in name for name in model_names)]
    pattern = re.compile(rf"(?<=\.)(?:{'|'.join(map(re.escape, inner))})+") if inner else None
    short = {name: pattern.sub("", name) if pattern and "._" in name else name for name in names}
    if len(set(short.values())) < len(short):
        short = {name: name for name in names}
    prefix = wrapper_prefix(short.values(), model_names)
    return {name: bare.removeprefix(prefix) for name, bare in short.items()}


def from_float32(value: float) -> float:
    """Return the short decimal number that was stored as a float32 attribute.

    The value 1e-5 stored in float32 reads back as 9.999999747378752e-06. Six significant digits restore it.

    Example:
        >>> from_float32(9.999999747378752e-06)
        1e-05
    """
    return float(f"{value:.{_FLOAT32_DIGITS}g}")


def momentum_from_decay(decay: float) -> float:
    """Return torch's momentum for a decay, the weight of the old value (ONNX, Keras and Flax ``momentum``).

    Args:
        decay: Weight of the old running statistics, unitless, as stored in float32.

    Returns:
        Weight of the new batch: ``1 - decay``.

    Source:
        ONNX operator BatchNormalization: ``running = input * momentum + batch * (1 - momentum)``.

    Example:
        >>> momentum_from_decay(0.8999999761581421)
        0.1
    """
    return from_float32(1.0 - from_float32(decay))


def noise_of_average(momentum: float) -> float:
    """Return the variance of settled running statistics, in units of the variance of a batch statistic.

    It is the sum of the squared weights of the batches, a/(2 - a).

    Args:
        momentum: a, the weight of the new batch.

    Example:
        >>> round(noise_of_average(0.1), 4)
        0.0526
    """
    return momentum / (2 - momentum)


def momentum_of_updates(momentum: float, updates: float) -> float:
    """Return the momentum of one update that leaves as much of the old value as several updates do.

    Args:
        momentum: Weight of the new batch in one update, from 0 to 1.
        updates: Number of updates. 1/k returns the momentum with which k updates weigh as much as one with `momentum`.

    Returns:
        ``1 - (1 - momentum)^updates``.

    Source:
        The geometric series; https://github.com/deepinsight/insightface/issues/2053 has it for 1/2.

    Example:
        >>> round(momentum_of_updates(0.1, 2), 4), round(momentum_of_updates(0.19, 1 / 2), 4)
        (0.19, 0.1)
    """
    return 1.0 if momentum >= 1 else -math.expm1(updates * math.log1p(-momentum))
