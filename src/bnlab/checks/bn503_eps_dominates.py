"""BN503: eps, not the data, sets the scale of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnlab.checks.cases import executed, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, in_channels, limit, show
from bnlab.observe.evidence import Masks, Pruned
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Observed
from bnlab.records import Finding, Quantity

__all__ = ["EpsDominates"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN503."""

    channels: float = limit(
        0.5,
        unit="fraction",
        source="the twelve real networks of docs/background.md have up to 0.25 of a layer (2 of 8, 5 of 24, 36 of 256 "
        "channels)",
    )


class EpsDominates(ModelCheck[Limits]):
    """A layer whose batch variance is below eps in most channels, so that it does not normalise.

    ## What it does
    The check compares the variance within batches with eps.

    ## Why it matters
    The output has the variance var/(var + eps). This is below 1/2 where the variance is less than eps, and near 0 where
    it is far less. The layer passes on the small scale that it should remove, with a fixed gain of 1/sqrt(eps).
    Gradients are as small as without the layer: a loss with inputs of 1e-30 stands still. Unscaled input and a tiny
    initialisation are the usual reasons.

    ## Evidence
    The check uses batches of `data`. It leaves out constant channels, whose variance is 0 or at most the rounding noise
    (eps(dtype) * mean)^2. Such a channel is dead upstream, for example behind a ReLU, and shows nothing about the
    scale. It also leaves out pruned channels, in which all weights that compute them are 0. Working networks often have
    single weak channels (BN106), so the check requires a share of the layer.

    ## Threshold
    The check reports a variance below eps in at least a share `channels` of the channels.

    ## Remedy
    `manual`: scale the input or the initialisation. Use a smaller eps if the small scale is intended.

    ## Sources
    docs/background.md, "Channels that hardly vary"; the experiment `huge-gap` of the lab (docs/lab.md), in which inputs
    of 1e-30 do not move the loss.
    """

    code, group, needs = "BN503", Group.SUSPICIOUS, Needs.DATA
    remedies = ("manual",)
    why = "the output keeps the small scale of the input instead of a variance of 1"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why there is nothing to judge."""
        return "not run on finite data" if layer.data is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that does not normalise."""
        for layer in evidence.layers:
            if layer.data is None:
                continue
            weak = _weak(layer.data, layer.eps)
            if layer.execution is not None and layer.execution.pruned is not None:
                weak &= ~layer.execution.pruned.mask(layer.channels)
            if not weak.any() or weak.mean() < self.limits.channels:
                continue
            channels = tuple(np.flatnonzero(weak).tolist())
            var = float(np.median(layer.data.within_var[weak]))
            yield self.finding(
                layer,
                f"batch variance is {show(var)} at the median {in_channels(channels, layer)}, must be >= eps "
                f"{show(layer.eps)}",
                channels=channels,
                measured={
                    "variance": Quantity(var, "input^2"),
                    "channels": Quantity(float(weak.mean()), "fraction"),
                },
                threshold={
                    "variance": Quantity(layer.eps, "input^2"),
                    "channels": Quantity(self.limits.channels, "fraction"),
                },
            )

    CLEAN = (
        Case("ordinary", model),
        Case("one weak channel of four", lambda: _of_variance((1e-7, 1, 1, 1))),
        Case("dead behind a ReLU", lambda: _of_variance((0, 0, 0, 1))),
        Case("rounding noise around 5000", lambda: _of_variance((1e-7,) * 4, mean=(5000,) * 4)),
        Case("equal to eps", lambda: _of_variance((1e-5,) * 4)),
        Case("pruned, with padding as the only variation", lambda: _of_variance((1e-7, 1e-7, 1, 1), pruned=(0, 1))),
        Case("eps 0", lambda: model(model_layer(eps=0.0, data=observed(var=(1e-12,) * 4)))),
        Case("no data", lambda: model(model_layer(data=None))),
    )
    BROKEN = (
        Case(
            "a tiny initialisation",
            lambda: _of_variance((1e-8, 1e-8, 1e-8, 1)),
            layers=("bn",),
            channels=(0, 1, 2),
            measured={"variance": 1e-8, "channels": 0.75},
        ),
        Case(
            "inputs of 1e-30",
            lambda: _of_variance((5e-61,) * 4, mean=(1.5e-30,) * 4),
            layers=("bn",),
            channels=(0, 1, 2, 3),
        ),
    )


def _weak(data: Observed, eps: float) -> Masks:
    """Return the channels with a variance below eps and above the rounding noise of a constant."""
    with np.errstate(over="ignore"):
        noise = (data.input_eps * data.within_mean) ** 2
    return np.asarray((data.within_var < eps) & (data.within_var > noise))


def _of_variance(
    var: tuple[float, ...], mean: tuple[float, ...] = (0.3, -0.7, 0.1, 0), *, pruned: tuple[int, ...] = ()
) -> ModelEvidence:
    execution = executed(pruned=Pruned(pruned, ("conv",)) if pruned else None)
    return model(model_layer(data=observed(mean=mean, var=var), execution=execution))
