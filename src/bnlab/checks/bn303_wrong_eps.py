"""BN303: another eps than that of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import healthy, model, model_layer, observed
from bnlab.checks.check import Case, Group, ModelCheck, Needs, limit, show
from bnlab.checks.effects import is_stale
from bnlab.observe.model_evidence import EPS_GAIN, EPS_MISMATCH, EpsFit, ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity
from bnlab.wording import OWN_FORMULA

__all__ = ["WrongEps"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN303."""

    mismatch: float = limit(EPS_MISMATCH, unit="squared noise", source="as far as noise and 0.05 std explain")
    gain: float = limit(EPS_GAIN, unit="ratio of mismatches", source="0 of 316 healthy networks in a trial")
    factor: float = limit(
        2.0, unit="ratio", source="the value is within a factor of 2 in 202 of 207 networks of a trial"
    )


class WrongEps(ModelCheck[Limits]):
    """Layers with another eps than the one that the network was trained with.

    ## What it does
    The check looks for one eps, for the whole network or for a single layer, with which the running statistics of all
    layers fit the training data, and compares it with the eps of the layers.

    ## Why it matters
    A state dict does not hold eps. Keras has 1e-3, some ports have 1e-6, and torch has 1e-5. Where the variance of a
    channel is not far above eps, another eps changes the scale of the output, and the layers behind get inputs that
    they were not trained on. A network that was trained with 1e-3 and rebuilt with 1e-5 fell from an accuracy of 0.99
    to 0.96 or much less. Recalibration hides the mistake and does not remove it.

    ## Evidence
    The training data run with batch statistics and with values of eps from 1e-7 to 1e-1. Only layers behind another BN
    layer show eps, because their input depends on it. The mismatch of a layer is the mean over channels of the squared
    difference between the running statistics and those of the data, in units of the noise and 0.05 standard
    deviations. The check runs only where the statistics do not fit as they are. Eps cannot be identified where the
    statistics have not settled, where no BN layer is behind, or where eps moves no input by 0.05 standard deviations.

    ## Threshold
    The mismatch must be above `mismatch` with the eps of the layers, and above `gain` times that of the best eps, which
    must differ by more than `factor`. With the best eps no layer may be stale (BN401). This includes the first layer,
    whose input does not depend on eps: another scale of the input looks like another eps in all others.

    ## Remedy
    `set-eps` sets the eps of the training in each layer.

    ## Sources
    The default of `tf.keras.layers.BatchNormalization`
    (https://www.tensorflow.org/api_docs/python/tf/keras/layers/BatchNormalization), 1e-3, and of
    `torch.nn.BatchNorm2d` (https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html), 1e-5;
    docs/background.md, "Conventions of other frameworks".
    """

    code, group, needs = "BN303", Group.SUSPICIOUS, Needs.TRAIN_DATA
    remedies = ("set-eps",)
    why = "eval mode scales the channels otherwise than in training, and the layers behind get other inputs"
    limits = Limits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why a layer shows nothing of eps."""
        if layer.state is None or layer.train_data is None:
            return "no running statistics, or not run on train_data"
        return OWN_FORMULA if layer.own_formula is not None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding for an eps that fits."""
        fit = evidence.eps_fit
        if fit is None or fit.value is None or not self._explains(fit, evidence):
            return
        concerned = [layer for layer in evidence.layers if fit.layer in (None, layer.name)]
        layers = [layer for layer in concerned if not self._agree(layer.eps, fit.value)]
        if not layers:
            return
        own = sorted({layer.eps for layer in layers})
        yield self.finding(
            layers[0] if len(layers) == 1 else None,
            f"eps is {' and '.join(f'{eps:g}' for eps in own[:3])}, and the running statistics fit the training data "
            f"with {fit.value:g} ({fit.interval}), must agree within a factor of {show(self.limits.factor)}",
            measured={
                "eps": Quantity(fit.value, "input^2"),
                "mismatch": Quantity(fit.own, "squared noise"),
                "mismatch with this eps": Quantity(fit.best, "squared noise"),
            },
            threshold={"mismatch": Quantity(self.limits.mismatch, "squared noise")},
        )

    def _agree(self, eps: float, other: float) -> bool:
        return max(eps, other) <= self.limits.factor * min(eps, other)

    def _explains(self, fit: EpsFit, evidence: ModelEvidence) -> bool:
        """Return whether the statistics fit with this eps and not without it."""
        if fit.misfit or fit.own <= self.limits.mismatch or fit.own <= self.limits.gain * fit.best:
            return False
        return not any(
            is_stale(dataclasses.replace(layer, train_data=fit.fitted[layer.name]))
            for layer in evidence.layers
            if layer.name in fit.fitted and layer.own_formula is None
        )

    CLEAN = (
        Case("fits as it is", model),
        Case("another eps fits no better", lambda: _fit(own=26.0, best=20.0)),
        Case("nearly the same eps", lambda: _fit(value=1.5e-5)),
        Case("a layer does not fit either", lambda: _fit(misfit=("bn",))),
        Case("stale with any eps", lambda: _fit(fitted={"bn": observed(mean=(2.3, 1.3, 2.1, 3.2))})),
        Case("not identifiable", lambda: model(eps_fit=EpsFit(reason="no BN layer is behind"))),
    )
    BROKEN = (
        Case("trained with 1e-3", lambda: _fit(), layers=(None,), measured={"eps": 1e-3, "mismatch": 26.0}),
        Case("one layer of two", lambda: _fit(layer="bn"), layers=("bn",), measured={"eps": 1e-3}),
        Case("an upper bound", lambda: _fit(low=0.0), layers=(None,)),
    )


def _fit(**changes: object) -> ModelEvidence:
    parts: dict[str, object] = {
        "value": 1e-3,
        "low": 8e-4,
        "high": 1.2e-3,
        "own": 26.0,
        "best": 0.02,
        "fitted": {"bn": observed()},
        **changes,
    }
    stale = model_layer("bn", state=healthy(), train_data=observed(var=(0.1, 0.2, 0.05, 0.1)))
    return model(model_layer("first"), stale, eps_fit=EpsFit(**parts))  # type: ignore[arg-type]  # the parts of EpsFit, typed there
