"""Evidence about a model: its structure, one forward pass, and passes over data, as plain numbers without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bnlab.conventions import LARGE_MOMENTUM, noise_of_average
from bnlab.observe.evidence import Floats, LayerState, Pruned
from bnlab.records import Numbers, StatisticsVerdict
from bnlab.wording import counted

__all__ = [
    "EPS_GAIN",
    "EPS_MISMATCH",
    "BetweenBatches",
    "EpsFit",
    "ExchangedChannels",
    "Execution",
    "FeatureAxis",
    "Gap",
    "Gradient",
    "MixingModule",
    "ModelEvidence",
    "ModelLayer",
    "Observed",
    "OutputGap",
    "Padding",
    "PaddingEffect",
    "Port",
    "Producer",
    "StrayLayer",
]

EPS_MISMATCH = 1.0
"""Mismatch of running statistics above which they do not fit their data; noise and 0.05 std explain 1."""

EPS_GAIN = 4.0
"""Ratio of the mismatches with the eps of the layers and with another eps above which the other one fits better."""


@dataclass(frozen=True, kw_only=True)
class Producer:
    """The convolution or linear layer whose output goes straight into a BN layer.

    Attributes:
        name: The path of the convolution or linear layer.
        has_bias: Whether it has a bias.
        feeds_only_this: Whether the BN layer alone uses its output.
        same_axis: Whether its output channels are the channels of the BN layer.
        filter_norms: The norm of the weights of each output channel, shape (C,); None where they are not the channels
            of the BN layer, or where it is not known.
    """

    name: str
    has_bias: bool
    feeds_only_this: bool
    same_axis: bool
    filter_norms: Floats | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class FeatureAxis:
    """The axis along which the layers before a BN layer put the features. Where they wrote several, axis 1 counts.

    Attributes:
        axis: The axis of the input of the BN layer, which normalises axis 1.
        shape: Shape of that input.
        producer: Path of the module that puts the features there; "" for the model itself.
        kind: Name of the class of that module.
    """

    axis: int
    shape: tuple[int, ...]
    producer: str
    kind: str


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
        pruned: The channels of its input that are the same for all data, or None.
        features: The axis of its input that holds the features; None where this is unclear. Of several calls, one that
            has them on another axis than axis 1 counts.
    """

    calls: int
    samples: int
    counts: tuple[int, ...]
    producer: Producer | None = None
    dropout: str | None = None
    activation: str | None = None
    pruned: Pruned | None = None
    features: FeatureAxis | None = None


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
        batch_rows: The statistics of single batches, one row for each, shape (B, 2c): the means in standard deviations,
            then half the logs of the variances, both relative to those of all batches. At most 256 batches and 32
            channels are kept. None if they were not recorded.
        between_calls: Difference between the calls of the layer within one pass, in standard deviations: the root mean
            square, over calls and channels, of the larger of their effects on mean and variance. 0 for one call.
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
    batch_rows: Floats | None = None
    between_calls: float = 0.0

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
        with momentum a. A momentum above 0.5 keeps one batch or two: their noise is then the fault, and no chance.
        """
        own = 0.0 if momentum is None or momentum > LARGE_MOMENTUM else noise_of_average(momentum)
        return self.mean_error**2 + own * self.batch_mean_var, self.var_error**2 + own * self.batch_var_var

    @property
    def images_per_batch(self) -> float:
        """Mean number of samples in a batch."""
        return self.images / max(self.batches, 1)


@dataclass(frozen=True, kw_only=True)
class BetweenBatches:
    """The means of batches against those of shuffled samples, with the statistics of the whole data set in every BN.

    Attributes:
        batches: Number of batches that are compared.
        samples: Mean number of samples in a batch.
        ratio: Variance of the batch means, relative to its mean over all orders of the samples, over all channels.
        z: The ratio as a standard normal deviate: how improbable it is if the samples are shuffled.
    """

    batches: int
    samples: float
    ratio: float
    z: float


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


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Constant runs at one end of the training inputs: padding, or values that are really constant.

    Attributes:
        side: "end" or "beginning".
        samples: Number of samples that were examined.
        padded_samples: Number of samples with such a run.
        share: Share of the positions that lie in such a run, unitless.
        lengths: Number of positions of the shortest and of the longest batch.
        proof: What shows that the runs are padding, as a clause; None where the values may be really constant.
    """

    side: str
    samples: int
    padded_samples: int
    share: float
    lengths: tuple[int, int]
    proof: str | None

    @property
    def certain(self) -> bool:
        """Whether the runs are certain to be padding."""
        return self.proof is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddingEffect:
    """What padded positions change in the batch statistics of a layer.

    The statistics are means over batches, with every BN layer before it on batch statistics. All arrays have the shape
    (C,), float64.

    Attributes:
        share: Share of the positions that are padding, unitless.
        mean: Mean over all positions, input units.
        var: Biased variance over all positions, squared input units.
        valid_mean: Mean over the positions that are no padding.
        valid_var: Biased variance over these positions.
    """

    share: float
    mean: Floats
    var: Floats
    valid_mean: Floats
    valid_var: Floats


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
        between: How much its input differs between the batches of `data`; None where their samples cannot be compared.
        train_between: How much its input differs between the batches of `train_data`, likewise.
        common_data: Its input over `data` in batches that are as large as those of `train_data`; None where they are
            large enough as they are, or where they cannot be joined.
        common_train_data: Its input over `train_data` in batches that are as large as those of `data`, likewise.
        comparable: Whether `data` and `train_data` can be compared. Where either has few values per channel in a batch,
            the batches must have a common size, because the noise of the layers upstream depends on it.
        dropped: Its input over the training data (else `data`) with dropout on; None if nothing drops values.
        gap: The difference between the modes on `data`.
        gradient: The gradient of the loss; None without a loss.
        padding: What padded positions of the training inputs change in its batch statistics; None where none enter.
        padding_unknown: Why it is not known whether padded positions enter; None where it is known.
        trained_with: Whether the loss shows that the weights were trained with the stored statistics. The layer is then
            frozen in effect, and has no gap.
        trained_by_batch: Whether the layer is in eval mode, its weight and bias are frozen, and the loss shows that the
            weights of the model were trained with its batch statistics.
        disobeys: Whether it normalises with the batch after `model.eval()`, although it has running statistics.
        reason_to_disobey: Why it does so, as the end of a sentence that begins with "it".
        own_formula: Why its output is not that of BN, as the end of a sentence that begins with "it"; None if it is.
        averaged: Number of models of which its weights are the average, as `torch.optim.swa_utils.AveragedModel`
            counts them; None if its weights are not an average.
        is_unreadable: Whether it has running statistics that cannot be read, such as those on the meta device.
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
    between: BetweenBatches | None = None
    train_between: BetweenBatches | None = None
    common_data: Observed | None = None
    common_train_data: Observed | None = None
    comparable: bool = True
    dropped: Observed | None = None
    gap: Gap | None = None
    gradient: Gradient | None = None
    padding: PaddingEffect | None = None
    padding_unknown: str | None = None
    trained_with: bool = False
    trained_by_batch: bool = False
    disobeys: bool = False
    reason_to_disobey: str = ""
    own_formula: str | None = None
    averaged: int | None = None
    is_unreadable: bool = False

    @property
    def between_calls(self) -> float:
        """Difference between its calls within one pass, in standard deviations; 0 for one call, or without data."""
        return max((seen.between_calls for seen in (self.data, self.train_data) if seen is not None), default=0.0)

    @property
    def compared(self) -> tuple[Observed, Observed] | None:
        """The inputs over `data` and over `train_data`, at a common count; None where they cannot be compared."""
        data, train_data = self.common_data or self.data, self.common_train_data or self.train_data
        return None if data is None or train_data is None or not self.comparable else (data, train_data)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpsFit:
    """The eps with which the running statistics fit the training data.

    Attributes:
        layer: Path of the only layer that has it; None if every layer has it.
        value: The eps that fits best, squared input units; None if it cannot be identified.
        low: Smallest eps that fits nearly as well; 0 if any smaller one does.
        high: Largest eps that fits nearly as well.
        own: Mismatch at the eps of the layers, where 1 is what noise explains.
        best: Mismatch at `value`.
        fitted: The inputs of the layers over the training data with `value`.
        misfit: Layers whose statistics do not fit at `value` either.
        reason: Why eps cannot be identified; None if it can.
    """

    layer: str | None = None
    value: float | None = None
    low: float = 0.0
    high: float = math.inf
    own: float = 0.0
    best: float = 0.0
    fitted: Mapping[str, Observed] = field(default_factory=dict)
    misfit: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def is_identified(self) -> bool:
        """Whether there is an eps with which every layer fits."""
        return self.value is not None and not self.misfit

    @property
    def is_better(self) -> bool:
        """Whether every layer fits with another eps, and not with that of the layers."""
        return self.is_identified and self.own > max(EPS_MISMATCH, EPS_GAIN * self.best)

    @property
    def interval(self) -> str:
        """The values of eps that fit, as text."""
        return f"at most {self.high:.2g}" if self.low == 0 else f"{self.low:.2g} to {self.high:.2g}"


@dataclass(frozen=True, kw_only=True)
class ExchangedChannels:
    """A network that runs better on images with channels 0 and 2 exchanged.

    Attributes:
        name: Name of the metric, or of the loss where there is none.
        value: The metric on the images as they are.
        exchanged: The metric on the images with channels 0 and 2 exchanged.
        batches: Number of batches on which it was measured.
    """

    name: str
    value: float
    exchanged: float
    batches: int

    @property
    def note(self) -> str:
        """The observation as a note of a diagnosis."""
        return (
            f"the colour channels of data may be exchanged (RGB for BGR): {self.name} is {self.value:.3g} as they are, "
            f"and {self.exchanged:.3g} with channels 0 and 2 exchanged, on {counted(self.batches, 'batch', 'batches')}"
        )


@dataclass(frozen=True, kw_only=True)
class Port:
    """One exact change with which the running statistics of every layer fit the training data.

    Attributes:
        fault: The mistake as a noun phrase, such as "standard deviations stored as running_var".
        statement: The mistake as a sentence without a final stop, such as "running_var holds standard deviations".
        change: What undoes it, as a clause that begins with "once", such as "once it is squared".
        layers: Paths of the layers that show it.
        before: Mean effect of the stored statistics on normalised outputs, in standard deviations. A channel counts by
            abs(difference of means)/std or abs(log of the ratio of variances)/2, whichever is larger, and at most by 1.
        after: The same after the change.
    """

    fault: str
    statement: str
    change: str
    layers: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class StrayLayer:
    """A BN layer that runs although `model.modules()` does not hold it, such as one in a plain list.

    Attributes:
        kind: Name of its class.
        parent: Path of the module that calls it; "" for the model itself.
        parent_kind: Name of the class of that module.
        attribute: Name of the attribute of the parent that holds it; None if it is held elsewhere.
        container: Name of the class of that attribute, such as "list"; None for the layer itself.
        training: Whether it is in train mode after `model.eval()`.
    """

    kind: str
    parent: str
    parent_kind: str
    attribute: str | None
    container: str | None
    training: bool


@dataclass(frozen=True, kw_only=True)
class MixingModule:
    """The first module whose input is the same and whose output differs without the other half of the batch.

    Attributes:
        name: Its path; "" for the model itself.
        kind: Name of its class.
        is_batch_norm: Whether it is a BN layer, or calls `batch_norm` with its training flag.
        is_leaf: Whether it has no submodules. The own forward of a module with submodules mixes the samples itself.
    """

    name: str
    kind: str
    is_batch_norm: bool
    is_leaf: bool


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
        mixing_module: The module that mixes the samples; None where it is not known, or where nothing does.
        by_function: Modules that are no BN layers and call `batch_norm` with its training flag after `model.eval()`, by
            path, with the names of their classes.
        unregistered: The BN layers that run although `model.modules()` does not hold them.
        failure: The error that ended the run of the model on the example or the data; None if it ran.
        numbers: The metric under four choices of data and statistics; None without a metric.
        metric_error: Paired standard error of eval_batch - eval_running; None where it is not known.
        recalibrated_error: Paired standard error of eval_recalibrated - eval_running; None where it is not known.
        padding: The padding in the training inputs, or what looks like it; None where there is none.
        statistics: The verdict on the layers whose statistics are stale; None if there are none.
        exchanged: What exchanged colour channels of the evaluation data would explain; None where nothing shows them.
        trains: Whether any parameter of the model requires a gradient.
        eps_fit: The eps with which the statistics fit the training data; None where they fit as they are, or without
            training data.
        port: The exact change with which the statistics fit the training data in every layer; None without one.
        notes: Remarks on the observation, such as batches that were left out.
        unknown: Codes of the checks for which the model gives no evidence whatever is passed, each with the reason.
    """

    layers: tuple[ModelLayer, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    output_gap: OutputGap | None = None
    mixing: float | None = None
    mixing_module: MixingModule | None = None
    by_function: Mapping[str, str] = field(default_factory=dict)
    unregistered: tuple[StrayLayer, ...] = ()
    failure: str | None = None
    numbers: Numbers | None = None
    metric_error: float | None = None
    recalibrated_error: float | None = None
    padding: Padding | None = None
    statistics: StatisticsVerdict | None = None
    exchanged: ExchangedChannels | None = None
    trains: bool = True
    eps_fit: EpsFit | None = None
    port: Port | None = None
    notes: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ported(self) -> bool:
        """Whether another eps or an exact change of the statistics explains that they do not fit."""
        return self.port is not None or (self.eps_fit is not None and self.eps_fit.is_better)
