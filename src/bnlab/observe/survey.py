"""Observes a model with whatever the caller passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlab.conventions import FEW_VALUES
from bnlab.errors import UsageError
from bnlab.functional.moments import widened
from bnlab.observe.comparison import Comparison
from bnlab.observe.data_passes import NOTHING, CommonCount, DataPass, DataPasses, require_finite
from bnlab.observe.discover import any_batch_norm, channels_of, is_of_frozen_class, is_quantised, why_frozen
from bnlab.observe.eps_fit import fit_eps
from bnlab.observe.evidence import LayerState
from bnlab.observe.exchanged_channels import exchanged_channels
from bnlab.observe.formula import OwnFormulas
from bnlab.observe.gap import RunningStatistics, layer_gap
from bnlab.observe.inputs import Inputs
from bnlab.observe.mixing import floating_outputs, measure_mixing
from bnlab.observe.model_evidence import EpsFit, Execution, Gradient, ModelEvidence, ModelLayer, OutputGap
from bnlab.observe.padding import with_padding
from bnlab.observe.passes.batches import first_samples, samples_in
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.dropout import dropping_paths
from bnlab.observe.passes.executed_graph import ExecutedGraph, execute
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.observe.passes.layer_statistics import OneValueInEachBatch
from bnlab.observe.passes.modes import Modes, kept_in_mode, observe_modes, set_eval_mode
from bnlab.observe.passes.offloaded import has_hooks_of_accelerate
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.passes.regroup import regrouped
from bnlab.observe.passes.subject import ForwardFailed, Subject, usage_error_unless
from bnlab.observe.ported import port_of
from bnlab.observe.structure import executions
from bnlab.observe.transfers import to_host
from bnlab.wording import counted, enumerated, listed

__all__ = ["StaleLayers", "survey"]

_OUTPUT_BATCHES = 4
"""Number of batches on which the outputs of the whole network are compared."""

_EXAMPLE_SAMPLES = 4
"""Number of samples of the first batch that record the executed graph, which holds all its tensors for a while."""

_FAILED = "forward failed"
_MAX_NAMES = 3


StaleLayers = Callable[[ModelEvidence], Sequence[str]]
"""Returns the layers whose statistics are not those of the training data, the most stale first."""


def survey(
    model: nn.Module, states: Mapping[str, LayerState], inputs: Inputs, stale_layers: StaleLayers = lambda _: ()
) -> ModelEvidence:
    """Observe a model, and restore its modes, buffers and attributes and the state of the random number generators.

    Args:
        model: Any module.
        states: The stored numbers of its layers, by path.
        inputs: The example, data, metric, loss and optimizer.
        stale_layers: Returns the layers on whose statistics there must be a verdict.

    Returns:
        The evidence. Where forward fails, it holds the structure of the model and the error.

    Raises:
        UsageError: If the metric or the loss raises, or if a data set has no batch.
    """
    subject = Subject(model, inputs.forward)
    with subject.untouched():
        return _collect_evidence(subject, states, inputs.read(), stale_layers)


def _collect_evidence(
    subject: Subject, states: Mapping[str, LayerState], inputs: Inputs, stale_layers: StaleLayers
) -> ModelEvidence:
    model = subject.model
    modules = any_batch_norm(model)
    averages = _averages(model)
    layers = {
        name: replace(
            _layer(model, name, module, states.get(name), inputs.optimizer),
            averaged=next((count for prefix, count in averages.items() if name.startswith(prefix)), None),
        )
        for name, module in modules.items()
    }
    missing = {
        key: f"no {key} given"
        for key in ("example", "data", "train_data", "metric", "loss", "optimizer")
        if getattr(inputs, key) is None
    }
    trains = any(parameter.requires_grad for parameter in model.parameters())
    notes = (*_steps_without_updates(layers.values(), inputs.optimizer), *_quantised(modules))
    evidence = ModelEvidence(layers=tuple(layers.values()), missing=missing, notes=notes, trains=trains)
    example = inputs.example_or_first_batch
    if example is None:
        return evidence
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta for tensor in tensors) and not has_hooks_of_accelerate(model):
        raise UsageError("model: it must have values to run on data, got parameters on the meta device.")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError("model: it must know its shapes, got a lazy layer. Run one batch first.")
    with subject.untouched():
        modes = observe_modes(model, next(batches_of([example], model)), subject.forward)
    disobedient = dict.fromkeys([*modes.in_train_mode, *modes.disobedient])
    evidence = replace(_with_modes(evidence, modes), notes=(*notes, *_kept_in_eval_mode(disobedient)))
    if not layers:
        return replace(evidence, missing={key: reason for key, reason in missing.items() if key != "example"})
    with subject.with_hooks([model.get_submodule(name) for name in disobedient], partial(kept_in_mode, training=False)):
        return _run(subject, modules, evidence, inputs, stale_layers)


def _kept_in_eval_mode(paths: Iterable[str]) -> Iterator[str]:
    names = [path or "the model" for path in paths]
    if names:
        yield f"every measurement keeps {enumerated(names, _MAX_NAMES)} in eval mode, because model.eval() does not"


def _with_modes(evidence: ModelEvidence, modes: Modes) -> ModelEvidence:
    """Return the evidence with what does not obey `model.eval()`."""
    layers = tuple(
        replace(layer, disobeys=True, reason_to_disobey=modes.disobedient[layer.name])
        if layer.name in modes.disobedient
        else layer
        for layer in evidence.layers
    )
    return replace(evidence, layers=layers, by_function=modes.by_function, unregistered=modes.unregistered)


def _run(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    evidence: ModelEvidence,
    inputs: Inputs,
    stale_layers: StaleLayers,
) -> ModelEvidence:
    """Run the example and the data; a forward that fails ends the run, and its error is part of the evidence."""
    try:
        evidence, inputs, dropping = _with_executions(subject, evidence, inputs, modules)
        if inputs.data is None:
            return evidence
        return _with_data(subject, modules, evidence, inputs, dropping, stale_layers)
    except ForwardFailed as error:
        failed = dict.fromkeys(("data", "train_data", "metric", "loss"), _FAILED)
        missing = {**failed, **evidence.missing}
        if not any(layer.execution is not None for layer in evidence.layers):
            missing["example"] = _FAILED
        return replace(evidence, failure=str(error), missing=missing)


def _averages(model: nn.Module) -> dict[str, int]:
    """Return the prefix of the layer names in every averaged model, with the number of models in the average."""
    counts = {}
    for name, module in model.named_modules():
        counter = getattr(module, "n_averaged", None)
        if (
            isinstance(counter, Tensor)
            and counter.numel() == 1
            and isinstance(getattr(module, "module", None), nn.Module)
        ):
            counts[f"{name}.module." if name else "module."] = int(counter)
    return counts


def _layer(
    model: nn.Module,
    name: str,
    module: nn.Module,
    state: LayerState | None,
    optimizer: torch.optim.Optimizer | None,
) -> ModelLayer:
    affine = [p for key in ("weight", "bias") if isinstance(p := getattr(module, key, None), nn.Parameter)]
    return ModelLayer(
        name=name,
        kind=type(module).__name__,
        channels=channels_of(module),
        momentum=getattr(module, "momentum", None),
        eps=float(getattr(module, "eps", 0.0)),
        training=module.training,
        frozen=why_frozen(model, name) is not None,
        updates=state is not None
        and bool(getattr(module, "track_running_stats", True))
        and (not is_of_frozen_class(module) or bool(getattr(module, "moves_statistics", False))),
        affine_trains=any(parameter.requires_grad for parameter in affine) if affine else None,
        decay=None if optimizer is None else _decay(module, optimizer),
        state=state,
        is_unreadable=state is None and getattr(module, "running_mean", None) is not None,
    )


def _steps_without_updates(layers: Iterable[ModelLayer], optimizer: torch.optim.Optimizer | None) -> Iterator[str]:
    """Yield a note where the optimizer took more steps than any layer counted batches."""
    steps = [int(state["step"]) for state in (optimizer.state.values() if optimizer else ()) if "step" in state]
    counters = [layer.state.num_batches_tracked for layer in layers if layer.state is not None]
    counted_batches = max((counter for counter in counters if counter is not None), default=None)
    if steps and counted_batches is not None and max(steps) > counted_batches:
        yield (
            f"the optimizer took {max(steps):,} steps and no layer counted more than "
            f"{counted(counted_batches, 'batch', 'batches')}: the weights changed while the statistics did not"
        )


def _quantised(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield a note on the layers that compute with quantised values."""
    names = [name or "the model" for name, module in modules.items() if is_quantised(module)]
    if names:
        layers = listed(names, _MAX_NAMES)
        yield f"quantised layers normalise with their running statistics in every measurement: {layers}"


def _decay(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    by_parameter = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    own = module.named_parameters(recurse=False)
    return {name: by_parameter[id(parameter)] for name, parameter in own if id(parameter) in by_parameter}


def _with_executions(
    subject: Subject, evidence: ModelEvidence, inputs: Inputs, modules: Mapping[str, nn.Module]
) -> tuple[ModelEvidence, Inputs, Collection[str]]:
    """Run the example; return the evidence with what it shows, the inputs, and the modules that drop values.

    Where the model does not run on single samples, the inputs are those with larger batches.

    Raises:
        ForwardFailed: If forward raises.
    """
    example, notes = inputs.example_or_first_batch, evidence.notes
    try:
        shown = _executions(subject, example, modules, few=inputs.example is None)
    except ForwardFailed:
        joined = None
        if isinstance(inputs.data, KeptBatches) and inputs.example is None and samples_in(example) == 1:
            joined = regrouped(inputs.data, FEW_VALUES)
        if joined is None:
            raise
        shown = _executions(subject, joined[0], modules, few=False)
        batches = counted(len(joined), "batch", "batches")
        notes = (*notes, f"data: its samples were joined into {batches}: the model does not run on one sample")
        inputs = replace(inputs, data=joined)
    layers = {layer.name: layer for layer in evidence.layers}
    names = [*shown.layers, *(name for name in layers if name not in shown.layers)]
    ordered = (
        replace(layers[name], execution=shown.layers.get(name), own_formula=shown.own_formulas.get(name))
        for name in names
    )
    missing = {key: reason for key, reason in evidence.missing.items() if key != "example"}
    notes = (*notes, *(f"{name}: the layer {reason}" for name, reason in shown.own_formulas.items()))
    return replace(evidence, layers=tuple(ordered), missing=missing, notes=notes), inputs, shown.dropping


@dataclass(frozen=True)
class _Shown:
    """What a pass over the example shows.

    Attributes:
        layers: What it shows about each layer, in the order in which they ran.
        dropping: Paths of the modules that drop values.
        own_formulas: The layers whose output is not that of BN, by path, with the reason.
    """

    layers: Mapping[str, Execution]
    dropping: Collection[str]
    own_formulas: Mapping[str, str]


def _executions(subject: Subject, example: Batch, modules: Mapping[str, nn.Module], *, few: bool) -> _Shown:
    """Run the example. With `few`, its first samples are enough, provided that the model accepts a shorter batch.

    Raises:
        ForwardFailed: If forward raises.
    """
    batch = next(batches_of([example], subject.model))
    if few:
        with suppress(Exception):
            return _executions_on(subject, first_samples(batch, _EXAMPLE_SAMPLES), modules)
    return _executions_on(subject, batch, modules)


def _executions_on(subject: Subject, batch: Batch, modules: Mapping[str, nn.Module]) -> _Shown:
    model, formulas = subject.model, OwnFormulas(modules)
    with subject.untouched(), torch.no_grad(), usage_error_unless("forward must run on the example", ForwardFailed):
        model.eval()
        with formulas.watching():
            graph = execute(model, batch, modules.values(), forward=subject.forward)
        train_graph = _train_graph(subject, batch)
        layers = executions(model, graph, modules, train_graph=train_graph)
        return _Shown(layers, dropping_paths(model, graph, train_graph), formulas.reasons())


def _train_graph(subject: Subject, batch: Batch) -> ExecutedGraph | None:
    """Return the calls of a pass in train mode, which may include more dropout than eval mode; None if the pass fails.

    A copy of the model runs, because train mode may change things that a snapshot does not restore, such as weights
    that are changed in place.
    """
    with suppress(Exception):
        twin = copy.deepcopy(subject.model).train()
        with impose_batch_statistics(twin):
            return execute(twin, batch, any_batch_norm(twin).values(), forward=subject.forward)
    return None


def _with_data(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    evidence: ModelEvidence,
    inputs: Inputs,
    dropping: Collection[str],
    stale_layers: StaleLayers,
) -> ModelEvidence:
    data = cast("KeptBatches", inputs.data)
    passes = DataPasses(subject, modules, inputs.advance)
    require_finite("data", data)
    trained_on, failure = _training_pass(passes, inputs)
    if failure is not None:
        evidence = replace(evidence, failure=failure, missing={**evidence.missing, "train_data": _FAILED})
    seen, usable = _evaluation_pass(passes, data, trained_on)
    shuffled = passes.over_shuffled("data", seen.usable)
    between = passes.between_batches("data", None if seen is trained_on else seen)
    train_between = passes.between_batches("train_data", trained_on)
    common, train_shuffled = CommonCount(), NOTHING
    if trained_on is not None:
        train_shuffled = passes.over_shuffled("train_data", trained_on.usable)
        common = passes.at_common_count(seen, trained_on)
    reference = seen if trained_on is None else trained_on
    dropped = NOTHING
    if any(layer.execution is not None and layer.execution.dropout is not None for layer in evidence.layers):
        dropped = passes.over_dropping("data with dropout on", reference.usable, dropping)
    gradients = _gradients(subject, evidence, inputs, seen.usable)
    layers = tuple(
        _with_gap(
            replace(
                layer,
                data=seen.seen.get(layer.name),
                train_data=None if trained_on is None else trained_on.seen.get(layer.name),
                shuffled=shuffled.get(layer.name),
                train_shuffled=train_shuffled.get(layer.name),
                between=between.get(layer.name),
                train_between=train_between.get(layer.name),
                common_data=common.data.get(layer.name),
                common_train_data=common.train_data.get(layer.name),
                comparable=common.possible,
                dropped=dropped.get(layer.name),
                gradient=gradients.get(layer.name),
            )
        )
        for layer in evidence.layers
    )
    evidence = replace(evidence, layers=layers, notes=(*evidence.notes, *passes.notes))
    if trained_on is not None:
        evidence = with_padding(evidence, subject, modules, trained_on.usable)
    with usage_error_unless("forward must run on every batch of data", ForwardFailed):
        evidence = replace(_with_mixing(subject, usable, evidence), output_gap=_output_gap(subject, seen.usable))
    if trained_on is not None:
        eps_fit = _eps_fit(subject, modules, evidence, trained_on, inputs)
        evidence = replace(evidence, eps_fit=eps_fit, port=port_of(evidence.layers))
    comparison = Comparison(
        subject=subject,
        modules=modules,
        loss=inputs.loss,
        score=inputs.score,
        reference=reference.finite,
        held_out=None if trained_on is None else seen.finite,
        advance=lambda: inputs.advance("comparing statistics"),
    )
    train_data = None if trained_on is None else trained_on.usable
    evidence = comparison.add_to(evidence, stale_layers(evidence), data, usable, train_data)
    exchanged = None if usable is None else exchanged_channels(subject, seen.finite, inputs.loss, inputs.score)
    notes = () if exchanged is None else (exchanged.note,)
    return replace(evidence, exchanged=exchanged, notes=(*evidence.notes, *notes))


def _eps_fit(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    evidence: ModelEvidence,
    trained_on: DataPass,
    inputs: Inputs,
) -> EpsFit | None:
    return fit_eps(
        subject,
        modules,
        evidence.layers,
        trained_on.finite,
        always=inputs.infers_eps,
        advance=lambda: inputs.advance("comparing eps"),
    )


def _training_pass(passes: DataPasses, inputs: Inputs) -> tuple[DataPass | None, str | None]:
    """Return the pass over the training data, and the error if it failed; None for both without training data."""
    if inputs.train_data is None:
        return None, None
    train_data = cast("KeptBatches", inputs.train_data)
    try:
        require_finite("train_data", train_data)
        return passes.over_joined("train_data", train_data), None
    except ForwardFailed as error:
        return None, str(error)


def _evaluation_pass(
    passes: DataPasses, data: KeptBatches, trained_on: DataPass | None
) -> tuple[DataPass, KeptBatches | None]:
    """Return the pass over the evaluation data, and the batches on which batch statistics can be measured.

    Data that leave one value per channel give no statistics: the training data take their place.
    """
    try:
        seen = passes.over_joined("data", data)
    except OneValueInEachBatch:
        if trained_on is None:
            raise
        passes.notes.append(
            "data: it leaves one value per channel, which has no variance: the layers are judged on train_data"
        )
        return trained_on, None
    return seen, seen.usable


def _with_mixing(subject: Subject, data: KeptBatches | None, evidence: ModelEvidence) -> ModelEvidence:
    if data is None or any(layer.state is None for layer in evidence.layers):
        return evidence
    mixing = measure_mixing(subject, data, evidence.by_function)
    if mixing is None:
        return evidence
    return replace(evidence, mixing=mixing.change, mixing_module=mixing.module)


def _with_gap(layer: ModelLayer) -> ModelLayer:
    if layer.data is None or layer.state is None or layer.frozen or layer.own_formula is not None:
        return layer
    once = layer.execution is None or layer.execution.calls == 1
    shuffled = layer.shuffled if once else None  # the calls of a shared layer differ for other reasons than chance
    running = RunningStatistics(
        mean=layer.state.running_mean,
        var=layer.state.running_var,
        dtype=layer.state.dtype,
        momentum=layer.momentum,
        eps=layer.eps,
    )
    common = layer.compared if layer.common_data is not None or layer.common_train_data is not None else None
    gap = layer_gap(running, layer.data, layer.train_data, layer.dropped, shuffled, common)
    return replace(layer, gap=gap)


def _output_gap(subject: Subject, data: Iterable[Batch]) -> OutputGap | None:
    """Compare the outputs of the whole network with running statistics and with batch statistics."""
    model = subject.model
    numbers: list[Tensor] = []
    sizes: list[int] = []
    with subject.untouched(), torch.no_grad():
        set_eval_mode(model)
        for batch in islice(batches_of(data, model), _OUTPUT_BATCHES):
            running = floating_outputs(subject, batch)
            with impose_batch_statistics(model):
                by_batch = floating_outputs(subject, batch)
            for left, right in zip(running, by_batch, strict=False):
                if left.shape == right.shape:
                    numbers += _gap_between(widened(left), widened(right))
                    sizes.append(right.numel())
    values = [value.numpy() for value in to_host(numbers)]
    square = spread = total = 0.0
    broken = False
    for place, size in enumerate(sizes):
        is_finite, left_is_finite, own_square, own_spread = values[4 * place : 4 * place + 4]
        if is_finite:
            broken |= not left_is_finite
            square += float(own_square)
            spread += float(own_spread)
            total += size
    if not total or not spread > 0:
        return None
    return OutputGap(relative=(square / spread) ** 0.5, not_finite=broken)


def _gap_between(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return whether the right output is finite, whether the left one is, and two sums of squares, of shape () each."""
    squares = (left - right).square().nan_to_num(posinf=0.0), (right - right.mean(0, keepdim=True)).square()
    return right.isfinite().all(), left.isfinite().all(), squares[0].sum(), squares[1].sum()


def _gradients(subject: Subject, evidence: ModelEvidence, inputs: Inputs, data: Iterable[Batch]) -> dict[str, Gradient]:
    """Return the gradient of the loss at the weights of every layer's producer, on the first batch."""
    if inputs.loss is None:
        return {}
    model = subject.model
    producers = {
        layer.name: layer.execution.producer.name
        for layer in evidence.layers
        if layer.execution is not None and layer.execution.producer is not None
    }
    weights = {name: getattr(model.get_submodule(path), "weight", None) for name, path in producers.items()}
    wanted = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor) and weight.requires_grad}
    if not wanted:
        return {}
    batch = next(iter(batches_of(data, model)))
    with subject.untouched(), torch.enable_grad(), usage_error_unless("loss must be a scalar of model and batch"):
        set_eval_mode(model)
        with impose_batch_statistics(model):
            loss = inputs.loss(model, batch)
            grads: Sequence[Tensor | None] = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    value = float(loss.detach())
    return {
        name: Gradient(
            producer=producers[name],
            relative=float(grad.double().norm() * weight.detach().double().norm()) / max(abs(value), 1e-300),
            loss=value,
        )
        for (name, weight), grad in zip(wanted.items(), grads, strict=True)
        if grad is not None
    }
