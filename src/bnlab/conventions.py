"""The one place that translates names and numbers between frameworks.

In bnlab ``momentum`` is torch's: the weight of the *new* batch in the running statistics, ``None`` for a cumulative
average. Keras, Flax and ONNX store the weight of the *old* value instead.
"""

from __future__ import annotations

__all__ = [
    "TORCH_EPS",
    "TORCH_MOMENTUM",
    "WRAPPER_PREFIXES",
    "from_float32",
    "momentum_from_decay",
]

TORCH_MOMENTUM = 0.1
"""Default ``momentum`` of ``torch.nn.BatchNorm*d``: weight of the new batch."""

TORCH_EPS = 1e-5
"""Default ``eps`` of ``torch.nn.BatchNorm*d``, in squared input units."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel and DDP, ``torch.compile`` and common trainers put before every name of a state dict."""

_FLOAT32_DIGITS = 6


def from_float32(value: float) -> float:
    """Return the short decimal that a float32 attribute stood for.

    A file that stores 1e-5 in float32 reads back as 9.999999747378752e-06; six significant digits survive the trip.

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
