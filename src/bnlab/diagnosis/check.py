"""Runs the checks on evidence and says what they found."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bnlab._version import __version__
from bnlab.diagnosis.conclusion import concluded_causes, conclusion
from bnlab.diagnosis.layer_records import layer_records
from bnlab.diagnosis.run_checks import run_checks
from bnlab.diagnosis.settings import Settings
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.evidence import Evidence, Hyperparameters, NetworkState
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.progress import reporting
from bnlab.records import DiagnosisRecord, Finding, LayerRecord, Level, Summary, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnlab.observe.passes.batches import MaxBatches
    from bnlab.observe.survey import Inputs

__all__ = ["Diagnosis", "check", "check_with"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(DiagnosisRecord):
    """What `bnlab.check` returns: the record, which also prints as a report."""

    def __repr__(self) -> str:
        """Return one line."""
        return f"<Diagnosis of {self.target.name!r}: {self.conclusion}>"

    def __str__(self) -> str:
        """Return the text report, 80 columns wide and without colours."""
        from bnlab.report.text.diagnosis import render

        return render(self)

    def _repr_html_(self) -> str:
        """Return a compact view for a notebook: the conclusion, the numbers, the network and the worst findings."""
        from bnlab.report.html import compact

        return compact.diagnosis(self)


_SETTLED = 0.1
"""Staleness, in standard deviations, below which running statistics are those of the data."""


def check(
    target: str | os.PathLike[str] | nn.Module,
    *,
    data: Iterable[Any] | None = None,
    train_data: Iterable[Any] | None = None,
    metric: Callable[[nn.Module, Any], float] | None = None,
    example: Any = None,  # noqa: ANN401 - a batch may be anything
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_batches: MaxBatches = "auto",
    select: Sequence[str] | None = None,
    ignore: Mapping[str, str] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    momentum: float | Literal["assumed"] | None = "assumed",
    eps: float | Literal["assumed"] = "assumed",
    per_channel: bool = False,
    progress: bool | None = None,
) -> Diagnosis:
    """Diagnose the BN state of a checkpoint, without model code, or of a model, with whatever else there is.

    A model is run on an example and on data if they are given, and is as it was afterwards: modes, buffers, attributes
    and random numbers.

    Args:
        target: Path of a file written by ``torch.save``, safetensors or an ONNX exporter; or a model.
        data: What the model will see: any iterable of batches that can be run through again. A batch is a tensor, a
            tuple or list (input first), a dict (passed as keywords), or whatever the model takes.
        train_data: What it was trained on, likewise. Without it staleness and shift are one cause.
        metric: metric(model, data) -> float, higher is better; always measured on `data`.
        example: One batch, to see the graph that is executed; the first batch of `data` if not given.
        loss: loss(model, batch) -> scalar, to see the gradients.
        optimizer: The one the model is trained with, to see what decays.
        max_batches: How many batches of either data set are used. "auto": all, or where there are more than 64, 64
            spread evenly over data that knows its length, and the first 64 of other data, with a warning; the report
            says so. A number: at most so many, held in memory. None: all; the numbers of the metric and the statistics
            are those of all, and 64 are held for the rest. Either data set is read once, with None up to six times.
        select: Codes of the checks to run, or beginnings of codes ("BN1"); all of them if not given.
        ignore: Code to reason. An ignored check still runs; its findings are dropped and the reason is kept.
        limits: Code to thresholds that replace the defaults, as in ``{"BN107": {"ratio": 20}}``.
        momentum: Weight of the new batch the network was trained with, unitless, in [0, 1]; None for a cumulative
            average. A state dict does not hold it: torch's 0.1 is assumed, and said, unless it is stated. A stated
            value wins over that of an ONNX file or a model.
        eps: Added to the variance, squared input units; the same holds with torch's 1e-5.
        per_channel: Whether the layers of the diagnosis carry a value for each channel (`LayerRecord.per_channel`).
        progress: Whether to show on stderr what is going on; None for where it is a terminal, or in a notebook.

    Returns:
        The diagnosis.

    Raises:
        UsageError: If an argument is outside what it may be.
        UnreadableFile, NotACheckpoint, DamagedFile, PickledModule, MissingPackage: If the file cannot be read.
        NoBatchNorm: If there is no BN layer.

    Example:
        >>> import bnlab
        >>> bnlab.check("model.pt").summary.layers  # doctest: +SKIP
        19
    """
    settings = Settings.of(
        select=select, ignore=ignore, limits=limits, momentum=momentum, eps=eps, per_channel=per_channel
    )
    observed_with = {
        "data": data,
        "train_data": train_data,
        "metric": metric,
        "example": example,
        "loss": loss,
        "optimizer": optimizer,
    }
    observed_with = {key: value for key, value in observed_with.items() if value is not None}
    if observed_with and isinstance(target, (str, os.PathLike)):
        raise UsageError(f"check: target must be a model to use {next(iter(observed_with))}, got a path.")
    if not observed_with:
        return check_with(target, settings)
    from bnlab.observe.survey import Inputs

    with reporting(progress) as advance:
        inputs = Inputs(**observed_with, max_batches=max_batches, advance=advance)
        return check_with(target, settings, inputs=inputs)


def check_with(
    target: str | os.PathLike[str] | nn.Module,
    settings: Settings,
    *,
    inputs: Inputs | None = None,
    name: str | None = None,
) -> Diagnosis:
    """Diagnose one target with validated settings.

    Args:
        target: As for :func:`check`.
        settings: The checks and what they need to know.
        inputs: What to observe a model with.
        name: What the diagnosis calls the target.
    """
    observed: ModelEvidence | None = None
    if isinstance(target, (str, os.PathLike)):
        found = Target("checkpoint", name or os.fspath(target))
        evidence = read_checkpoint(Path(target), settings.hyperparameters)
    else:
        from torch import nn

        from bnlab.observe.model import read_model
        from bnlab.observe.survey import Inputs, survey

        if not isinstance(target, nn.Module):
            raise UsageError(f"check: target must be a path or a torch.nn.Module, got {type(target).__name__}.")
        target = getattr(target, "_orig_mod", target)  # of a compiled model: one graph hides what runs
        found = Target("model", name or type(target).__name__)
        evidence = read_model(target, settings.hyperparameters)
        states = {layer.name: layer for network in evidence.networks for layer in network.layers}
        observed = survey(target, states, inputs or Inputs())
        evidence = _with_settled_layers(evidence, observed)
    if not evidence.networks and not (observed is not None and observed.layers):
        raise NoBatchNorm(_no_batch_norm(found, evidence))
    return _diagnose(evidence, found, settings, observed=observed, metric=_metric_name(inputs))


def _with_settled_layers(evidence: Evidence, observed: ModelEvidence) -> Evidence:
    """Mark the layers whose running statistics data showed to be right."""
    settled = {layer.name for layer in observed.layers if layer.gap is not None and layer.gap.staleness < _SETTLED}
    networks = tuple(
        NetworkState(
            network.name,
            tuple(dataclasses.replace(layer, settled=layer.name in settled) for layer in network.layers),
        )
        for network in evidence.networks
    )
    return dataclasses.replace(evidence, networks=networks)


def _metric_name(inputs: Inputs | None) -> str:
    name = getattr(inputs.metric, "__name__", "the metric") if inputs is not None else "the metric"
    return "the metric" if name.startswith("<") else str(name)


def _no_batch_norm(target: Target, evidence: Evidence) -> str:
    rule = f"{target.name}: {target.kind} must hold running statistics of batch normalization, got"
    if not evidence.left_alone:
        return f"{rule} none."
    path, reason = evidence.left_alone[0]
    others = len(evidence.left_alone) - 1
    return f"{rule} only what looks like it: {path or 'it'} {reason}{f' (and {others} more)' if others else ''}."


def _diagnose(
    evidence: Evidence,
    target: Target,
    settings: Settings,
    *,
    observed: ModelEvidence | None = None,
    metric: str = "the metric",
) -> Diagnosis:
    """Run the chosen checks on evidence with at least one layer."""
    findings, outcomes = run_checks(settings, evidence.networks, observed)
    layers = layer_records(evidence, observed, per_channel=settings.per_channel)
    summary = _summary(layers, findings)
    causes = concluded_causes(observed, findings)
    return Diagnosis(
        bnlab=__version__,
        target=target,
        layers=layers,
        outcomes=tuple(outcomes),
        findings=tuple(findings),
        conclusion=conclusion(findings, outcomes, summary, observed, causes, metric=metric),
        causes=causes,
        numbers=None if observed is None else observed.numbers,
        summary=summary,
        notes=tuple(_notes(layers, evidence, observed)),
    )


def _summary(layers: Sequence[LayerRecord], findings: Sequence[Finding]) -> Summary:
    counts = Counter(finding.level for finding in findings)
    return Summary(
        layers=len(layers),
        channels=sum(layer.channels for layer in layers),
        errors=counts[Level.ERROR],
        warnings=counts[Level.WARNING],
        infos=counts[Level.INFO],
    )


def _notes(layers: Sequence[LayerRecord], evidence: Evidence, observed: ModelEvidence | None) -> Iterable[str]:
    if observed is not None and observed.numbers is not None and "train_data" in observed.missing:
        yield "no train_data given: recalibrated means adapted to the evaluation data"
    yield from () if observed is None else observed.notes
    unused = [layer.name for layer in layers if layer.calls == 0]
    if unused:
        yield f"never ran on the example: {', '.join(unused)}"
    for name, value in (("momentum", Hyperparameters.momentum), ("eps", Hyperparameters.eps)):
        count = sum(name in layer.assumed for layer in layers)
        if count:
            yield f"{name} {value:g} is assumed in {count} of {len(layers)} layers: a state dict does not hold it"
    for name, reason in evidence.left_alone:
        yield f"left alone: {name or 'the file'} {reason}"
