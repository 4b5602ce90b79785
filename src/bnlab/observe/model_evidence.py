"""Evidence about a model: its structure, one forward pass, and passes over data, as plain numbers without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bnlab.observe.evidence import Floats, LayerState
from bnlab.records import Numbers, StatisticsVerdict

__all__ = [
    "Execution",
    "Gap",
    "Gradient",
    "ModelEvidence",
    "ModelLayer",
    "Observed",
    "OutputGap",
    "Producer",
]


@dataclass(frozen=True, kw_only=True)
class Producer:
    """The convolution or linear layer whose output goes straight into a BN layer.

    Attributes:
        name: The path of the convolution or linear layer.
        has_bias: Whether it has a bias.
        feeds_only_this: Whether the BN layer alone uses its output.
        same_axis: Whether its output channels are the channels of the BN layer.
    """

    name: str
    has_bias: bool
    feeds_only_this: bool
    same_axis: bool


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What one forward pass on an example shows about a BN layer.

    Attributes:
        calls: Number of times the layer ran.
        samples: N of its input.
        counts: Values per channel, N*prod(spatial), of each call.
        producer: The convolution or linear layer that feeds it, or None.
        dropout: Path of a dropout upstream with a rate above 0 and no other BN in between, or None.
        activation: Name of the saturating activation that takes its output, such as "sigmoid", or None.
    """

    calls: int
    samples: int
    counts: tuple[int, ...]
    producer: Producer | None = None
    dropout: str | None = None
    activation: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """The input of a layer over a data set, while every BN layer before it uses batch statistics.

    All arrays have the shape (C,), float64; `weights` are counts.

    Attributes:
        batches: Batches with finite statistics.
        images: Samples in these batches.
        count: Values per channel.
        smallest_count: Values per channel of the smallest batch.
        mean: Population mean, input units.
        var: Population variance by the law of total variance, M2/(N-1), squared input units.
        within_mean: Mean of the batch means, which running_mean of torch estimates.
        within_var: Mean of the unbiased batch variances, which running_var of torch estimates.
        batch_mean_var: Variance of the batch means over batches; 0 for a single batch.
        batch_var_var: Variance of the batch variances over batches; 0 for a single batch.
        image_mean_var: Variance of the means of single samples.
        image_square_var: Variance of the mean squared deviations of single samples.
        moments: Sums over batches, by name, from which every gap is computed.
        not_finite: Batches that were left out because the input was not finite.
        overflowed: Batches with a finite input whose variance the layer itself could not represent.
        own_error: Largest error, against float64, of the statistics that the layer computes itself, in standard
            deviations.
        input_eps: eps of the dtype of the input, unitless.
    """

    batches: int
    images: int
    count: int
    smallest_count: int
    mean: Floats
    var: Floats
    within_mean: Floats
    within_var: Floats
    batch_mean_var: Floats
    batch_var_var: Floats
    image_mean_var: Floats
    image_square_var: Floats
    moments: Mapping[str, Floats]
    not_finite: int = 0
    overflowed: int = 0
    own_error: float = 0.0
    input_eps: float = 2.0**-23

    @property
    def mean_error(self) -> Floats:
        """Standard error of the mean, from the means of single samples."""
        return np.sqrt(self.image_mean_var / max(self.images, 1))

    @property
    def var_error(self) -> Floats:
        """Standard error of the variance, from the squared deviations of single samples."""
        return np.sqrt(self.image_square_var / max(self.images, 1))

    def buffer_noise(self, momentum: float | None) -> tuple[Floats, Floats]:
        """Return the variances of the differences that chance allows between running and observed statistics.

        Each is SE^2 + Var(batch statistic) a/(2-a): the error of this data, and the noise of a settled moving average
        with momentum a.
        """
        own = 0.0 if momentum is None else momentum / (2 - momentum)
        return self.mean_error**2 + own * self.batch_mean_var, self.var_error**2 + own * self.batch_var_var

    @property
    def images_per_batch(self) -> float:
        """Mean number of samples in a batch."""
        return self.images / max(self.batches, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap:
    """The difference between train mode and eval mode at one layer, in normalised outputs.

    Attributes:
        square: Mean squared difference over the data and the channels.
        by_cause: The part of each cause. The parts add up to `square`, and a single part may be negative.
        per_channel: Mean squared difference of each channel. Shape (C,).
    """

    square: float
    by_cause: Mapping[str, float]
    per_channel: Floats

    @property
    def excess(self) -> float:
        """Root of the part of `square` that bessel and sampling noise do not explain, in standard deviations."""
        explained = self.by_cause.get("bessel", 0.0) + self.by_cause.get("sampling noise", 0.0)
        return float(np.sqrt(max(0.0, self.square - max(0.0, explained))))

    @property
    def staleness(self) -> float:
        """Root of the part of `square` that staleness, alone or together with shift, causes, in standard deviations."""
        part = self.by_cause.get("staleness", 0.0) + self.by_cause.get("staleness or shift", 0.0)
        return float(np.sqrt(max(0.0, part)))


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of a loss at the weights of a layer's producer.

    Attributes:
        producer: Path of the producer.
        relative: norm(gradient) norm(weight) / abs(loss), unitless: the largest relative change of the loss per
            relative change of the weights, to first order.
        loss: The loss.
    """

    producer: str
    relative: float
    loss: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelLayer:
    """One BN layer of a model.

    Attributes:
        name: Layer path.
        kind: Name of its class.
        channels: C.
        momentum: Weight of the new batch; None for a cumulative average.
        eps: Added to the variance.
        training: Whether it is in train mode.
        frozen: Whether it is frozen, as `bnlab.observe.discover.why_frozen` defines it.
        updates: Whether it updates its running statistics in train mode.
        affine_trains: Whether weight or bias requires a gradient; None for a layer with neither.
        decay: Weight decay of weight and bias in the optimizer, by name; None without an optimizer.
        state: The stored numbers; None for a layer without running statistics.
        execution: What a forward pass on an example shows; None without an example.
        data: Its input over `data`; None without `data`.
        train_data: Its input over `train_data`, with dropout off; None without `train_data`.
        shuffled: Its input over samples of `data` in random batches; None where the samples cannot be shuffled.
        train_shuffled: Its input over samples of `train_data` in random batches, likewise.
        dropped: Its input over the training data (else `data`) with dropout on; None if nothing drops values.
        gap: The difference between the modes on `data`.
        gradient: The gradient of the loss; None without a loss.
        trained_with: Whether the loss shows that the weights were trained with the stored statistics. The layer is then
            frozen in effect, and has no gap.
        averaged: Number of models of which its weights are the average, as `torch.optim.swa_utils.AveragedModel`
            counts them; None if its weights are not an average.
    """

    name: str
    kind: str
    channels: int
    momentum: float | None
    eps: float
    training: bool
    frozen: bool = False
    updates: bool = True
    affine_trains: bool | None = True
    decay: Mapping[str, float] | None = None
    state: LayerState | None = None
    execution: Execution | None = None
    data: Observed | None = None
    train_data: Observed | None = None
    shuffled: Observed | None = None
    train_shuffled: Observed | None = None
    dropped: Observed | None = None
    gap: Gap | None = None
    gradient: Gradient | None = None
    trained_with: bool = False
    averaged: int | None = None


@dataclass(frozen=True, kw_only=True)
class OutputGap:
    """The outputs of the whole network with running statistics and with batch statistics.

    Attributes:
        relative: rms difference, divided by the rms spread of the outputs with batch statistics.
        not_finite: Whether an output is finite with batch statistics and not finite with running statistics.
    """

    relative: float
    not_finite: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelEvidence:
    """Everything observed about a model.

    Attributes:
        layers: The BN layers, in the order in which they ran if that is known.
        missing: The inputs that the caller did not pass, with the reason: keys "example", "data", "train_data", "loss",
            "optimizer" and "metric".
        output_gap: The gap of the outputs of the whole network; None without data.
        mixing: Largest change of the output of a sample in eval mode that other samples in its batch cause, relative to
            the spread of the outputs; None if unknown.
        numbers: The metric under four choices of data and statistics; None without a metric.
        metric_error: Paired standard error of eval_batch - eval_running; None where it is not known.
        recalibrated_error: Paired standard error of eval_recalibrated - eval_running; None where it is not known.
        statistics: The verdict on the layers whose statistics are stale; None if there are none.
        notes: Remarks on the observation, such as batches that were left out.
    """

    layers: tuple[ModelLayer, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    output_gap: OutputGap | None = None
    mixing: float | None = None
    numbers: Numbers | None = None
    metric_error: float | None = None
    recalibrated_error: float | None = None
    statistics: StatisticsVerdict | None = None
    notes: tuple[str, ...] = ()
