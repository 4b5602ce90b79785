"""BN502: subtracting the mean loses the signal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.observe.evidence import Floats, Masks
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["Cancellation"]

_DEAD = 1e-3
"""Ratio of variance to eps below which a channel has nothing to lose: its output is 3 % of a standard deviation."""


@dataclass(frozen=True)
class Limits:
    """Limits of BN502."""

    own_error: float = limit(
        1e-3,
        unit="std",
        source="channels_last is off by 4e-3 at mean 100; a mean in float32 alone is off by 1e-3 at 17,000",
    )
    step: float = limit(1e-2, unit="std", source="as BN111: a hundred steps of the input per standard deviation")
    ratio: float = limit(
        20.0,
        unit="abs(mean) / std",
        source="largest in the twelve real networks of docs/background.md: 12.8; below it half precision is as coarse",
    )


class Cancellation(ModelCheck[Limits]):
    """A mean so far from 0 that subtracting it loses the signal.

    ## What it does
    The check compares the layer's own batch statistics with float64 ones. It also compares abs(mean) with the standard
    deviation, because an input near the mean has steps of eps(dtype) * abs(mean).

    ## Why it matters
    x - mean cancels. The input loses its fine steps before any kernel runs. Kernels that sum in float32, such as
    torch's CPU kernel for channels_last, lose more: at mean 1000 and std 1 their mean is off by 2.7 standard deviations
    and their variance by 700 %. Time stamps, coordinates and unscaled sensor values are the usual case.

    ## Evidence
    The check uses batches of `data`: mean and variance within batches, eps of the input's dtype, and the largest error
    of the layer's own statistics where it can be read. The check leaves out dead channels, which have nothing to lose.
    Their variance is below a thousandth of eps, or below the rounding noise of a constant, (eps(dtype) * mean / 2)^2.
    The error of the layer's own statistics is not known by channel, so it counts only if a living channel has a far
    mean.

    ## Threshold
    The check reports an error above `own_error`, or a step above `step` in channels beyond `ratio`. All are relative to
    sqrt(var + eps).

    ## Remedy
    `manual`: subtract a constant from the input before the network, run the layer in a wider dtype, or convert it to
    `bnlab.nn`.

    ## Sources
    Chan, Golub and LeVeque 1983; PyTorch issue 5410 (https://github.com/pytorch/pytorch/issues/5410);
    docs/background.md, "Floating-point precision"; docs/accuracy.md for measured errors.
    """

    code, group, needs = "BN502", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = "after the mean is subtracted, rounding is left instead of signal"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to judge."""
        return "not run on finite data" if layer.data is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that loses signal."""
        for layer in evidence.layers:
            if layer.data is None:
                continue
            far = _alive(layer.data, layer.eps) & (_distance(layer.data, layer.eps) > self.limits.ratio)
            steps = layer.data.input_eps * _distance(layer.data, layer.eps)
            channels = tuple(np.flatnonzero(far & (steps > self.limits.step)).tolist())
            error = layer.data.own_error if far.any() else 0.0
            messages, measured, threshold = [], {}, {}
            if channels:
                step = float(steps[list(channels)].max())
                messages.append(f"a step of the input is up to {show(step)} std {in_channels(channels, layer)}")
                messages[-1] += f", must be <= {show(self.limits.step)}"
                measured["step"], threshold["step"] = Quantity(step, "std"), Quantity(self.limits.step, "std")
            if error > self.limits.own_error:
                messages.append(
                    f"batch statistics are off by up to {show(error)} std, must be <= {show(self.limits.own_error)}"
                )
                measured["own error"], threshold["own error"] = (
                    Quantity(error, "std"),
                    Quantity(self.limits.own_error, "std"),
                )
            if messages:
                yield self.finding(
                    layer, "; ".join(messages), measured=measured, threshold=threshold, channels=channels or None
                )

    CLEAN = (
        Case("ordinary", model),
        Case("a mean of 12.8 std in bfloat16", lambda: _far(12.8, 1.0, input_eps=2.0**-7)),
        Case("a mean of 1000 std, exact kernel", lambda: _far(1e3, 1.0, own_error=1e-5)),
        Case("a constant of 5000", lambda: _far(5000.0, 0.0, own_error=0.5)),
        Case("rounding noise around 5000", lambda: _far(5000.0, 6e-8)),
        Case("an error of the statistics of a dead channel", lambda: _far(0.3, 1e-15, own_error=0.01)),
        Case("no data", lambda: model(model_layer(data=None))),
    )
    BROKEN = (
        Case(
            "time stamps",
            lambda: _far(1.7e9, 1e6),
            layers=("bn",),
            channels=(1,),
            measured={"step": 2.0**-23 * 1.7e9 / np.sqrt(1e6 + 1e-5)},
        ),
        Case("channels_last at mean 1000", lambda: _far(1e3, 1.0, own_error=2.7), layers=("bn",)),
        Case("bfloat16 at mean 100", lambda: _far(100.0, 1.0, input_eps=2.0**-7), layers=("bn",), channels=(1,)),
    )


def _distance(data: Observed, eps: float) -> Floats:
    """Return abs(mean) in standard deviations, eps included."""
    with np.errstate(all="ignore"):
        return np.asarray(np.abs(data.within_mean) / np.sqrt(data.within_var + eps))


def _alive(data: Observed, eps: float) -> Masks:
    with np.errstate(over="ignore"):
        noise = (data.input_eps * data.within_mean / 2) ** 2
    return np.asarray(data.within_var > np.maximum(_DEAD * eps, noise))


def _far(mean: float, var: float, *, own_error: float = 0.0, input_eps: float = 2.0**-23) -> ModelEvidence:
    data = observed(mean=(0, mean, 0.1, 1), var=(1, var, 1, 1), own_error=own_error, input_eps=input_eps)
    return model(model_layer(data=data))
