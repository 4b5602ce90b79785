"""Evidence about a training run: what happened to each BN layer from one optimizer step to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bnlab.conventions import TORCH_MOMENTUM, noise_of_average

__all__ = ["RankSpread", "RunLayer", "Sample", "StepOfLayer", "TrainingRun", "beyond_noise"]


@dataclass(frozen=True, kw_only=True)
class StepOfLayer:
    """What happened to one layer between two steps of the optimizer that trains it.

    A forward pass *updates* the layer if it changes the running statistics: in train mode, unless the layer is frozen.

    Attributes:
        step: Number of steps before: 0 for everything up to the end of the first step.
        updates: Forward passes that updated the layer, without recomputations and repetitions.
        backwards: Backward passes that the updates took part in. Several forward passes may share one.
        recomputed: Updates by a forward pass that ran again inside a backward pass.
        repeated: Updates by a forward pass on the same input as an earlier one that a backward pass used.
        repeated_outside: Pairs of updates on the same input of which a backward pass used at most one.
        without_gradients: Updates by forward passes of the whole model without gradients.
        without_step: Updates by forward passes with gradients that no backward pass used.
        training: Whether the layer was in train mode in the forward passes that gradients came from; None if there were
            none. With both modes it is True.
        frozen: Whether the layer was frozen then.
        count: The largest number of values per channel of an update; 0 without updates.
        inputs_train: Whether gradients go on through the input of the layer to parameters before it. None if unknown.
        skipped: Whether the gradient scaler skipped the step.
        trains: Whether an optimizer trains the weight or bias of the layer, or something else has changed them.
    """

    step: int
    updates: int = 0
    backwards: int = 0
    recomputed: int = 0
    repeated: int = 0
    repeated_outside: int = 0
    without_gradients: int = 0
    without_step: int = 0
    training: bool | None = None
    frozen: bool = False
    count: int = 0
    inputs_train: bool | None = None
    skipped: bool = False
    trains: bool = True

    @property
    def outside(self) -> int:
        """Updates by forward passes that no step used."""
        return self.without_gradients + self.without_step

    @property
    def moves(self) -> bool:
        """Whether anything changed the running statistics."""
        return self.updates + self.recomputed + self.repeated + self.outside > 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The statistics of two consecutive batches beside the running statistics, as means over the channels.

    Attributes:
        step: Step of the second batch.
        noise: Half the mean squared difference of the two batch means, in squared standard deviations.
        lag: Mean squared difference between the mean of the second batch and the running mean before its update, in
            squared standard deviations. It is noise*(1 + running_noise) where the statistics do not change.
        log_noise: `noise` of ln(var)/2.
        log_lag: `lag` of ln(var)/2.
        running_mean: Root mean square of running_mean over the channels, input units.
        running_var: Mean of running_var over the channels, squared input units.
        updated: Whether the batch updated the running statistics; False in eval mode.
        running_noise: Variance of the running statistics, in units of the noise of a batch.
    """

    step: int
    noise: float
    lag: float
    log_noise: float
    log_lag: float
    running_mean: float = 0.0
    running_var: float = 1.0
    updated: bool = True
    running_noise: float = noise_of_average(TORCH_MOMENTUM)

    @property
    def drift(self) -> float:
        """How far the running statistics lag behind, in standard deviations, beyond what noise explains."""
        own = 1 + self.running_noise
        squares = (self.lag - own * self.noise, self.log_lag - own * self.log_noise)
        return math.sqrt(max(0.0, *squares))


def beyond_noise(samples: Sequence[Sample]) -> float:
    """Return how many times larger the differences of several samples are than noise explains.

    It is the ratio of mean squares, of the means or of ln(var)/2, whichever is larger. 1 is what steady statistics have
    on average; inf stands for differences without any noise.
    """
    of_mean = (sum(one.lag for one in samples), sum((1 + one.running_noise) * one.noise for one in samples))
    of_var = (sum(one.log_lag for one in samples), sum((1 + one.running_noise) * one.log_noise for one in samples))
    return max(lag / noise if noise > 0 else (math.inf if lag > 0 else 0.0) for lag, noise in (of_mean, of_var))


@dataclass(frozen=True, kw_only=True)
class RankSpread:
    """How far the running statistics of a layer differ between ranks.

    Attributes:
        step: Step at which the ranks were compared.
        ranks: Number of ranks.
        difference: Root mean square over channels of the largest difference between ranks, in standard deviations.
        expected: The same as the noise of the batches of a rank explains it.
    """

    step: int
    ranks: int
    difference: float
    expected: float


@dataclass(kw_only=True, eq=False)
class RunLayer:
    """One BN layer of a watched model. The watch extends it while the model trains.

    Attributes:
        name: Layer path.
        channels: Number of channels.
        kind: Name of the class.
        momentum: Weight of the new batch; None for a cumulative average.
        has_affine: Whether the layer has a weight or a bias.
        is_fresh: Whether the running statistics had their initial values when the watch began.
        has_parameters_before: Whether modules with parameters run before the layer. None if that is not known.
        is_deferred: Whether `bnlab.once_per_step` updates the layer.
        reads_other_ranks: Whether its batch statistics are those of more values than one process has.
        steps: The steps so far, the latest ones alone where there are many.
        windows: Number of steps so far, with those that `steps` no longer holds.
        windows_outside: How many of them had updates that no step used.
        first_outside: The first of these, or None.
        others_step: Whether another optimizer steps between the steps of this layer, as in adversarial training.
        began_training: Whether the layer was in train mode in the first step; None before it.
        nonfinite_step: The step in which the running statistics took an inf or NaN; None if they did not.
        kept_out_step: The step in which the layer kept a batch with an inf or NaN out of them; None if it did not.
        kept_out: Number of such batches.
        samples: Statistics at the sampled steps.
        ranks: The latest comparison between ranks, or None.
        is_over: Whether the watch has ended, so that no step will follow.
    """

    name: str
    channels: int
    kind: str
    momentum: float | None
    has_affine: bool = True
    is_fresh: bool = False
    has_parameters_before: bool | None = None
    is_deferred: bool = False
    reads_other_ranks: bool = False
    steps: Sequence[StepOfLayer] = ()
    windows: int = 0
    windows_outside: int = 0
    first_outside: StepOfLayer | None = None
    others_step: bool = False
    began_training: bool | None = None
    nonfinite_step: int | None = None
    kept_out_step: int | None = None
    kept_out: int = 0
    samples: Sequence[Sample] = ()
    ranks: RankSpread | None = None
    is_over: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training run of one model.

    Attributes:
        layers: The layers, in the order in which they ran.
    """

    layers: tuple[RunLayer, ...] = field(default=())
