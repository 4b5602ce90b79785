"""Collects the evidence on a target, runs the checks, and returns the diagnosis."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bnlab._version import __version__
from bnlab.diagnosis.advice import advised
from bnlab.diagnosis.assumptions import assumed_defaults, assumption_behind, eps_that_matters
from bnlab.diagnosis.conclusion import concluded_causes, conclusion
from bnlab.diagnosis.graphs import NO_NODE, as_model, is_folded
from bnlab.diagnosis.incomplete import missing_parts, with_missing_parts
from bnlab.diagnosis.layer_records import layer_records
from bnlab.diagnosis.run_checks import run_checks, stale_layers
from bnlab.diagnosis.settings import Settings
from bnlab.errors import IncompleteFile, NoBatchNorm, UsageError
from bnlab.observe.evidence import Evidence, LayerState, NetworkState
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.progress import reporting
from bnlab.records import DiagnosisRecord, Finding, LayerRecord, Level, Summary, Target

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from bnlab.observe.inputs import Inputs
    from bnlab.observe.model_evidence import EpsFit
    from bnlab.observe.passes.calling import Forward
    from bnlab.observe.passes.kept_batches import MaxBatches

__all__ = ["Diagnosis", "check", "check_with"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(DiagnosisRecord):
    """The record that `bnlab.check` returns, which also prints as a report."""

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
"""Staleness, in standard deviations, below which running statistics count as those of the data."""


@one_at_a_time("check")
def check(
    target: str | os.PathLike[str] | Mapping[Any, Any] | nn.Module,
    *,
    data: Iterable[Any] | None = None,
    train_data: Iterable[Any] | None = None,
    metric: Callable[[nn.Module, Any], float] | str | None = None,
    lower_is_better: bool = False,
    example: Any = None,  # noqa: ANN401 - a batch may be anything
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    max_batches: MaxBatches = "auto",
    select: Sequence[str] | None = None,
    ignore: Mapping[str, str] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    momentum: float | Literal["assumed"] | None = "assumed",
    eps: float | Literal["assumed", "infer"] = "assumed",
    per_channel: bool = False,
    progress: bool | None = None,
) -> Diagnosis:
    """Diagnose the BN state of a checkpoint, without model code, or of a model, with any data that the caller passes.

    A model runs on the example and on the data, if the caller passes them. Afterwards its modes, buffers and attributes
    and the random number generators are restored.

    Args:
        target: Path of a file written by ``torch.save``, safetensors or an ONNX exporter; a model; or a state dict,
            which may lie inside other containers, as ``torch.load`` returns them.
        data: The data that the model will see: any iterable of batches that can be iterated more than once, or a
            function that returns a new one. A batch is a tensor, a tuple or list (input first, and as many elements as
            forward requires), a dict (the keywords that forward has), a list of images, a graph, or any other value
            that the model takes (docs/batches.md).
        train_data: The data on which the model was trained, in the same form. Without it staleness and shift are one
            cause.
        metric: metric(model, data) -> float, measured on `data` and on `train_data`; or "accuracy", "loss"
            (cross-entropy) or "miou" (mean intersection over union), for scores of shape (N, K, ...) and integer labels
            of shape (N, ...). The labels -100 and 255 mean no class, or another one that the name ends in: "miou:0".
        lower_is_better: Whether a lower metric is better. "loss" implies it.
        example: One batch, which records the executed graph; None for the first batch of `data`. A loader, a function
            that returns one, or a list of tuples, lists or dicts stands for its first batch.
        loss: loss(model, batch) -> scalar. It measures the gradients, and decides whether stale statistics belong to
            the weights. Without it the cross-entropy decides, where integer labels stand beside an output of shape
            (N, K, ...), or else the metric. Without a metric its mean takes the place of the metric.
        optimizer: The optimizer that trains the model, which shows the weight decay of each parameter.
        forward: forward(model, batch) -> output, for a model that cannot be called on a batch directly. Every
            measurement calls the model through it. A loss and a metric of the caller call the model by themselves.
        max_batches: How many batches of each data set are used. "auto" uses all of them, or 64 if there are more. These
            64 are spread evenly over data with a length. For data without a length they are the first 64, and a warning
            is issued. The report states how many batches were used. A number uses at most that many batches, held in
            memory. None uses all batches for the metric and the statistics, and holds 64 for everything else. Each data
            set is read once, or up to six times with None.
        select: Codes of the checks to run, or beginnings of codes ("BN1"); None for all checks.
        ignore: Maps codes to reasons. An ignored check still runs, but its findings are dropped and the reason is kept.
        limits: Maps codes to thresholds that replace the defaults, as in ``{"BN107": {"ratio": 20}}``.
        momentum: Weight of the new batch in the training of the network, unitless, in [0, 1]; None for a cumulative
            average. A state dict does not hold the momentum. Unless the caller states it, the default of torch, 0.1, is
            assumed, and a note reports the assumption. A stated value overrides that of an ONNX file or a model.
        eps: The constant added to the variance, in squared input units. The same rules apply, with the default of
            torch, 1e-5. "infer" looks for the eps with which the running statistics fit `train_data`, and checks the
            model with it (BN303 does the first part by itself where the statistics do not fit).
        per_channel: Whether the layers of the diagnosis hold a value for each channel (`LayerRecord.per_channel`).
        progress: Whether to show progress on stderr; None to show it on a terminal and in a notebook.

    Returns:
        The diagnosis.

    Raises:
        UsageError: If an argument is invalid.
        UnreadableFile, NotACheckpoint, DamagedFile, PickledModule, MissingPackage: If the file cannot be read.
        NoBatchNorm: If the target has no BN layer.

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
        "forward": forward,
    }
    observed_with = {key: value for key, value in observed_with.items() if value is not None}
    if observed_with and isinstance(target, (str, os.PathLike, Mapping)):
        got = "a state dict" if isinstance(target, Mapping) else "a path"
        raise UsageError(f"check: target must be a model to use {next(iter(observed_with))}, got {got}.")
    if not observed_with:
        return check_with(target, settings)
    from bnlab.observe.inputs import Inputs

    with reporting(progress) as advance:
        inputs = Inputs(**observed_with, lower_is_better=lower_is_better, max_batches=max_batches, advance=advance)
        return check_with(target, settings, inputs=inputs)


def check_with(
    target: str | os.PathLike[str] | Mapping[Any, Any] | nn.Module | ExportedProgram,
    settings: Settings,
    *,
    inputs: Inputs | None = None,
    name: str | None = None,
) -> Diagnosis:
    """Diagnose one target with validated settings.

    Args:
        target: Path, state dict or model, as for :func:`check`.
        settings: The checks to run, and the hyperparameters to assume.
        inputs: The data and functions with which a model is observed.
        name: Name of the target in the diagnosis; None for the path, "state dict", or the name of the class.
    """
    observed: ModelEvidence | None = None
    if isinstance(target, (str, os.PathLike, Mapping)):
        if inputs is not None:
            raise UsageError("check: target must be a model to use data, got a path or a state dict.")
        evidence = _stored_evidence(target, settings)
        observed = as_model(evidence)
        target_record = Target(
            "checkpoint", name or ("state dict" if isinstance(target, Mapping) else os.fspath(target))
        )
    else:
        from torch import nn

        from bnlab.observe.inputs import Inputs
        from bnlab.observe.programs.opened import is_program
        from bnlab.observe.wrappers import unwrapped

        if not (isinstance(target, nn.Module) or is_program(target)):
            raise UsageError(
                f"check: target must be a path, a torch.nn.Module or its state dict, got {type(target).__name__}."
            )
        target = unwrapped(target) if isinstance(target, nn.Module) else target
        target_record = Target("model", name or type(target).__name__)
        evidence, observed = _observed_target(target, settings, inputs or Inputs())
    has_layers = evidence.networks or (observed is not None and (observed.layers or _runs_strays(observed)))
    if not has_layers and not is_folded(evidence):
        if evidence.incomplete:
            raise IncompleteFile(f"{target_record.name}: {missing_parts(evidence)}")
        raise NoBatchNorm(_no_batch_norm(target_record, evidence))
    score = None if inputs is None else inputs.score
    name_of_metric = "the metric" if score is None else score.name
    return _diagnose(evidence, target_record, settings, observed=observed, metric=name_of_metric)


def _stored_evidence(target: str | os.PathLike[str] | Mapping[Any, Any], settings: Settings) -> Evidence:
    """Read a file or a state dict.

    Raises:
        UsageError: If eps is to be inferred, or the state dict holds no tensor.
        UnreadableFile, NotACheckpoint, DamagedFile, PickledModule, MissingPackage: If the file cannot be read.
    """
    if settings.infers_eps:
        kind = "state dict" if isinstance(target, Mapping) else "file"
        raise UsageError(
            f"eps: value must be a number for a {kind}, got 'infer'. Pass a model with data and train_data."
        )
    if not isinstance(target, Mapping):
        return read_checkpoint(Path(target), settings.hyperparameters)
    from bnlab.observe.files.state_in_memory import read_state_dict

    return read_state_dict(target, settings.hyperparameters)


def _observed_target(
    target: nn.Module | ExportedProgram, settings: Settings, inputs: Inputs
) -> tuple[Evidence, ModelEvidence]:
    """Return the evidence on a model or a graph of operators."""
    from bnlab.observe.fixed_batch_size import inputs_of_size
    from bnlab.observe.model import with_stored_layers
    from bnlab.observe.programs.opened import opened

    with opened(target) as program:
        inputs, left_out = inputs_of_size(inputs, program.batch_size)
        evidence, observed = _observed_model(program.model, settings, inputs)
        if not program.is_program:
            return evidence, observed
        if not (evidence.networks or observed.layers or program.stored or program.left_alone):
            raise NoBatchNorm(
                f"{program.kind}: the graph must hold BN, got none. It was folded away, it is spelled out in other "
                "operators, or it was never there."
            )
        evidence = with_stored_layers(evidence, program.stored, program.left_alone, settings.hyperparameters)
        notes = (*program.notes, *left_out, *observed.notes)
        return evidence, dataclasses.replace(observed, notes=notes, unknown=program.unknown)


def _observed_model(model: nn.Module, settings: Settings, inputs: Inputs) -> tuple[Evidence, ModelEvidence]:
    """Return the evidence on a model, with the inferred eps where that is asked for and possible.

    Raises:
        UsageError: If eps is to be inferred without training data.
    """
    if not settings.infers_eps:
        return _observe(model, settings, inputs)
    if inputs.train_data is None:
        raise UsageError("eps: value must be a number without train_data, got 'infer'. Pass data and train_data.")
    inputs = inputs.read()
    evidence, observed = _observe(model, settings, dataclasses.replace(inputs, infers_eps=True))
    fit = observed.eps_fit
    layers = [layer for layer in observed.layers if fit is not None and fit.layer in (None, layer.name)]
    if fit is None or fit.value is None or fit.misfit or all(fit.low <= layer.eps <= fit.high for layer in layers):
        return evidence, dataclasses.replace(observed, notes=(_why_eps_stays(fit), *observed.notes))
    inferred = f"eps {fit.value:g} is inferred from train_data: {fit.interval} fits"
    modules = [model.get_submodule(layer.name) for layer in layers]
    old = [module.eps for module in modules]
    try:
        for module in modules:
            module.eps = fit.value  # type: ignore[assignment]
        evidence, observed = _observe(model, settings, inputs)
    finally:
        for module, eps in zip(modules, old, strict=True):
            module.eps = eps
    return evidence, dataclasses.replace(observed, notes=(inferred, *observed.notes))


def _why_eps_stays(fit: EpsFit | None) -> str:
    if fit is None:
        return "eps cannot be inferred: the model did not run on train_data"
    if fit.value is None:
        return f"eps cannot be inferred: {fit.reason}"
    if fit.misfit:
        return f"eps cannot be inferred: the statistics of {fit.misfit[0]} fit train_data with no eps"
    return f"the eps of the layers fits train_data: {fit.interval} does"


def _observe(model: nn.Module, settings: Settings, inputs: Inputs) -> tuple[Evidence, ModelEvidence]:
    from bnlab.observe.model import read_model
    from bnlab.observe.passes.offloaded import values_at_hand
    from bnlab.observe.survey import survey

    with values_at_hand(model):
        evidence = read_model(model, settings.hyperparameters)
        states = {layer.name: layer for network in evidence.networks for layer in network.layers}
        observed = survey(model, states, inputs, partial(stale_layers, settings))
    return _with_settled_layers(evidence, observed), observed


def _with_settled_layers(evidence: Evidence, observed: ModelEvidence) -> Evidence:
    """Return the evidence with marks on layers whose statistics agree with the data or belong to the weights.

    Layers with pruned channels are marked too, and layers get the norms of the filters that compute their channels.
    """
    settled = {layer.name for layer in observed.layers if layer.gap is not None and layer.gap.staleness < _SETTLED}
    trained_with = {layer.name for layer in observed.layers if layer.trained_with}
    pruned = {layer.name: layer.execution.pruned for layer in observed.layers if layer.execution is not None}
    norms = {
        layer.name: layer.execution.producer.filter_norms
        for layer in observed.layers
        if layer.execution is not None and layer.execution.producer is not None and layer.execution.calls == 1
    }

    def marked(layer: LayerState) -> LayerState:
        return dataclasses.replace(
            layer,
            settled=layer.name in settled,
            trained_with=layer.name in trained_with,
            pruned=pruned.get(layer.name),
            filter_norms=norms.get(layer.name),
        )

    networks = tuple(
        NetworkState(network.name, tuple(marked(layer) for layer in network.layers)) for network in evidence.networks
    )
    return dataclasses.replace(evidence, networks=networks)


def _runs_strays(observed: ModelEvidence) -> bool:
    """Return whether BN layers run in train mode that the model does not hold as modules."""
    return any(layer.training for layer in observed.unregistered)


def _no_batch_norm(target: Target, evidence: Evidence) -> str:
    rule = f"{target.name}: {target.kind} must hold running statistics of batch normalization, got"
    if not evidence.left_alone:
        return f"{rule} none."
    path, reason = evidence.left_alone[0]
    others = len(evidence.left_alone) - 1
    where = path or f"the {target.kind}"
    return f"{rule} only similar state: {where} {reason}{f' (and {others} more)' if others else ''}."


def _diagnose(
    evidence: Evidence,
    target: Target,
    settings: Settings,
    *,
    observed: ModelEvidence | None = None,
    metric: str = "the metric",
) -> Diagnosis:
    """Run the selected checks on evidence with at least one layer."""
    findings, outcomes = run_checks(settings, evidence.networks, observed, evidence.graph)
    findings = advised(findings, observed)
    assumption = assumption_behind(settings, evidence.networks, findings)
    layers = layer_records(evidence, observed, per_channel=settings.per_channel)
    summary = _summary(layers, findings)
    causes = concluded_causes(observed, findings)
    concluded = conclusion(
        *(findings, outcomes, summary, observed, causes),
        metric=metric,
        assumption=assumption,
        instead=NO_NODE if is_folded(evidence) else None,
    )
    return Diagnosis(
        bnlab=__version__,
        target=target,
        layers=layers,
        outcomes=tuple(outcomes),
        findings=tuple(findings),
        conclusion=with_missing_parts(concluded, evidence),
        causes=causes,
        numbers=None if observed is None else observed.numbers,
        summary=summary,
        notes=tuple(_notes(layers, evidence, observed, assumption)),
        statistics=None if observed is None else observed.statistics,
        assumption=assumption,
        failure=missing_parts(evidence) if observed is None else observed.failure,
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


def _notes(
    layers: Sequence[LayerRecord], evidence: Evidence, observed: ModelEvidence | None, assumption: str | None
) -> Iterable[str]:
    if assumption is not None:
        yield assumption
    if is_folded(evidence):
        yield NO_NODE
    if observed is not None and observed.numbers is not None and "train_data" in observed.missing:
        yield "no train_data given: the recalibrated model is adapted to the evaluation data"
    yield from () if observed is None else observed.notes
    unused = [layer.name for layer in layers if layer.calls == 0]
    if unused:
        yield f"layers that never ran on the example: {', '.join(unused)}"
    yield from assumed_defaults(evidence, len(layers))
    yield from eps_that_matters(evidence)
    for name, reason in evidence.left_alone:
        yield f"left alone: {name or 'the file'} {reason}"
