"""BN608: the statistics of the batches change faster than the running statistics follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from bnlab.checks.cases import run_of
from bnlab.checks.check import Case, Group, Needs, RunCheck, limit, show
from bnlab.conventions import LARGE_MOMENTUM, SETTLED_WEIGHT, TORCH_MOMENTUM
from bnlab.observe.initial_values import updates_needed
from bnlab.observe.training_run import RunLayer, Sample, TrainingRun, beyond_noise
from bnlab.records import Finding, Quantity

__all__ = ["DriftOutrunsMomentum"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN608."""

    lag: float = limit(
        0.25,
        unit="standard deviations",
        source="up to 0.1 in a CNN on digits, by SGD and Adam at momentum 0.1 and 0.01",
    )
    kept_lag: float = limit(
        0.1, unit="standard deviations", source="the lag of those healthy runs, for which the momentum is computed"
    )
    ratio: float = limit(
        3,
        unit="times what noise explains",
        source="1 of 3,200 simulated steady layers exceeds it within 100 samples: 4 to 64 channels, 4 to 32 values",
    )
    samples: float = limit(
        8, unit="samples", source="with 4, chance exceeds both limits in 1 of 5 layers of 4 channels and 8 values"
    )


class DriftOutrunsMomentum(RunCheck[Limits]):
    """Statistics of the batches that change faster than the momentum lets the running statistics follow.

    ## What it does
    The check measures how far the running statistics lag behind those of the current batch, beyond noise.

    ## Why it matters
    Train mode uses the batch and does not show the lag. Eval mode uses the running statistics, which belong to the
    weights of 1/a steps ago at momentum a. The validation curve is then noisy or far below the training, most of all
    early in training, with a large learning rate, or with a small momentum.

    ## Evidence
    The watch samples two consecutive batches every now and then. Half the mean squared difference of their means is the
    noise v of a batch. A batch and running statistics without drift differ by v (1 + a/(2 - a)), and the rest is the
    square of the lag. The same holds for ln(var)/2. The initial values of a new layer are taken out. Samples count from
    step 44 on, and in a trained layer once the old statistics weigh less than 1 %.

    ## Threshold
    The median lag of the latest `samples` samples must not exceed `lag`, unless the whole difference is less than
    `ratio` times what noise explains.

    ## Remedy
    `recalibrate` before each evaluation and before you save, or `manual`: the momentum at which the same drift leaves a
    lag of `kept_lag`. A steady drift of d a step leaves the lag d/a. The momentum is at most 0.5, because above it the
    statistics are those of one or two batches. A cumulative average (momentum None) falls behind without end.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 3, figures 2 to 4 and table 1 (52.8 % error with running statistics,
    39.4 % with recomputed ones); docs/background.md, "Drift during training".
    """

    code, group, needs = "BN608", Group.NOTE, Needs.RUN
    remedies = ("recalibrate", "manual")
    why = "eval mode normalises with statistics of weights that the network no longer has"
    limits = Limits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer whose running statistics lag behind."""
        for layer in evidence.layers:
            samples = [sample for sample in layer.samples[-int(self.limits.samples) :] if sample.updated]
            if len(samples) < self.limits.samples or samples[0].step < _warm_up(layer):
                continue
            square = self.limits.lag**2  # the lag is at most the difference, which costs less to test after every step
            if 2 * sum(max(sample.lag, sample.log_lag) > square for sample in samples) < len(samples):
                continue
            lags = [sample.drift for sample in samples]
            if median(lags) > self.limits.lag and beyond_noise(samples) > self.limits.ratio:
                first = next(sample.step for sample, lag in zip(samples, lags, strict=True) if lag > self.limits.lag)
                yield self._finding(layer, first, median(lags))

    def _finding(self, layer: RunLayer, step: int, lag: float) -> Finding:
        momentum, wanted = layer.momentum, TORCH_MOMENTUM
        measured = {"lag": Quantity(lag, "standard deviations")}
        if momentum is None:
            way = f"a cumulative average falls behind without end: use momentum {TORCH_MOMENTUM:g}"
        else:
            wanted = min(LARGE_MOMENTUM, lag * momentum / self.limits.kept_lag)
            measured["momentum"] = Quantity(momentum, "weight of the batch")
            other = f", or use momentum {wanted:.2g} instead of {show(momentum)}"
            way = f"recalibrate before each evaluation{other if momentum < wanted else ''}"
        measured["momentum that follows"] = Quantity(wanted, "weight of the batch")
        text = (
            f"running statistics lag {show(lag)} standard deviations behind those of the batches, must be <= "
            f"{show(self.limits.lag)}; {way}"
        )
        threshold = {"lag": Quantity(self.limits.lag, "standard deviations")}
        return self.event(layer, step, text, measured=measured, threshold=threshold)

    CLEAN = (
        Case("noise alone", lambda: _sampled(0.0, noise=0.02)),
        Case("a small lag", lambda: _sampled(0.2)),
        Case("noise of tiny batches that looks like a lag", lambda: _sampled(0.5, noise=0.4)),
        Case("before the initial values are forgotten", lambda: _sampled(1.0, first=40)),
        Case("too few samples", lambda: _sampled(1.0, samples=7)),
        Case(
            "one sample that is far off",
            lambda: run_of(samples=[_sample(100 + step, 9.0 * (not step), 0.02) for step in range(8)]),
        ),
    )
    BROKEN = (
        Case(
            "a small momentum",
            lambda: _sampled(0.5, momentum=0.01, first=500),
            layers=("bn",),
            measured={"step": 500, "lag": 0.5, "momentum that follows": 0.05},
        ),
        Case("a cumulative average", lambda: _sampled(1.0, momentum=None), layers=("bn",)),
        Case(
            "a drift that no momentum follows",
            lambda: _sampled(2.0, momentum=0.5),
            layers=("bn",),
            measured={"lag": 2.0, "momentum that follows": 0.5},
        ),
    )


def _warm_up(layer: RunLayer) -> float:
    """Return the step from which on samples count: the initial values of a new layer are taken out of its samples."""
    return updates_needed(TORCH_MOMENTUM if layer.is_fresh else layer.momentum or TORCH_MOMENTUM, SETTLED_WEIGHT)


def _sample(step: int, lag: float, noise: float) -> Sample:
    square = lag**2 + noise * (1 + TORCH_MOMENTUM / (2 - TORCH_MOMENTUM))
    return Sample(step=step, noise=noise, lag=square, log_noise=noise, log_lag=noise)


def _sampled(
    lag: float, *, noise: float = 0.0, samples: int = 8, first: int = 100, momentum: float | None = 0.1
) -> TrainingRun:
    return run_of(samples=[_sample(first + step, lag, noise) for step in range(samples)], momentum=momentum)
