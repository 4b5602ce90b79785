"""Translates names and numbers between frameworks.

In bnlab ``momentum`` is torch's: the weight of the *new* batch in the running statistics, ``None`` for a cumulative
average. Keras, Flax and ONNX store the weight of the *old* value instead.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = [
    "FEW_VALUES",
    "LARGE_MOMENTUM",
    "SETTLED_WEIGHT",
    "TORCH_EPS",
    "TORCH_MOMENTUM",
    "WRAPPER_PREFIXES",
    "from_float32",
    "momentum_from_decay",
    "wrapper_prefix",
]

SETTLED_WEIGHT = 0.01
"""Weight of the initial values in a moving average below which it counts as settled."""

LARGE_MOMENTUM = 0.5
"""Momentum above which the running statistics are those of one or two batches."""

FEW_VALUES = 16
"""Values per channel in a batch below which batch statistics are noise: for 16, the mean gain is 9 % too high."""

TORCH_MOMENTUM = 0.1
"""Default ``momentum`` of ``torch.nn.BatchNorm*d``: weight of the new batch."""

TORCH_EPS = 1e-5
"""Default ``eps`` of ``torch.nn.BatchNorm*d``, in squared input units."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""Prefixes that DataParallel and DDP, ``torch.compile`` and common trainers add to every name of a state dict."""

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
    whole = ""
    while prefix := next((p for p in possible if all(name.startswith(whole + p) for name in names)), ""):
        whole += prefix
    return whole


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
