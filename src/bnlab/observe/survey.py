"""Everything that can be observed about a model with what the caller gives: an example, data, a metric, a loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError
from bnlab.observe.discover import any_batch_norm, channels_of, is_frozen
from bnlab.observe.evidence import LayerState
from bnlab.observe.gap import RunningStatistics, layer_gap
from bnlab.observe.metric import Metric, measure
from bnlab.observe.model_evidence import Execution, Gradient, ModelEvidence, ModelLayer, Observed, OutputGap
from bnlab.observe.passes.batches import (
    Without,
    batches_of,
    dealt,
    first_samples,
    require_data,
    run_batch,
    samples_in,
    tensors_in,
)
from bnlab.observe.passes.capture import observe
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.population import impose_batch_statistics
from bnlab.observe.passes.untouched import said, untouched
from bnlab.observe.structure import executions
from bnlab.wording import counted

__all__ = ["Inputs", "survey"]

_OUTPUT_BATCHES = 4
"""How many batches the outputs of the whole network are compared on."""

_EXAMPLE_SAMPLES = 4
"""How many samples of the first batch show the executed graph, all of whose tensors are held for a moment."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model is observed with; all of it optional.

    Attributes:
        data: Batches of what the model will see.
        train_data: Batches of what it was trained on.
        metric: metric(model, data) -> float, higher is better.
        example: One batch; the first of `data` if not given.
        loss: loss(model, batch) -> scalar.
        optimizer: The one the model is trained with.
        advance: Called with a word for what is going on, after every batch.
    """

    data: Iterable[Any] | None = None
    train_data: Iterable[Any] | None = None
    metric: Metric | None = None
    example: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    advance: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        for name in ("data", "train_data"):
            value = getattr(self, name)
            if value is not None:
                require_data(name, value)
        if self.data is None and (self.train_data is not None or self.metric is not None or self.loss is not None):
            raise UsageError("check: data must be given with train_data, metric or loss, got none.")
        for name in ("metric", "loss"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UsageError(f"{name}: it must be callable, got {type(value).__name__}.")


def survey(model: nn.Module, states: Mapping[str, LayerState], inputs: Inputs) -> ModelEvidence:
    """Observe a model. It is untouched afterwards: modes, buffers, attributes and random numbers.

    Args:
        model: Any module.
        states: The stored numbers of its layers, by path.
        inputs: What to observe it with.

    Raises:
        UsageError: If its forward, the metric or the loss raises, or data has no batch.
    """
    with torch.compiler.set_stance("force_eager"), untouched(model):
        return _surveyed(model, states, inputs)


def _surveyed(model: nn.Module, states: Mapping[str, LayerState], inputs: Inputs) -> ModelEvidence:
    modules = any_batch_norm(model)
    averages = _averages(model)
    layers = {
        name: replace(
            _layer(name, module, states.get(name), inputs.optimizer),
            averaged=next((count for prefix, count in averages.items() if name.startswith(prefix)), None),
        )
        for name, module in modules.items()
    }
    missing = {
        key: f"no {key} given"
        for key in ("example", "data", "train_data", "metric", "loss", "optimizer")
        if getattr(inputs, key) is None
    }
    example = _example(inputs)
    if example is None or not layers:
        return ModelEvidence(layers=tuple(layers.values()), missing=missing)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError("model: it must have values to run on data, got parameters on the meta device.")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError("model: it must know its shapes, got a lazy layer. Run one batch first.")
    missing.pop("example", None)
    ran = _executions(model, example, modules, few=inputs.example is None)
    ordered = [*ran, *(name for name in layers if name not in ran)]
    found = [replace(layers[name], execution=ran.get(name)) for name in ordered]
    evidence = ModelEvidence(layers=tuple(found), missing=missing)
    if inputs.data is None:
        return evidence
    return _with_data(model, modules, evidence, inputs, inputs.data)


def _averages(model: nn.Module) -> dict[str, int]:
    """Return the prefix of the names in every average of models, and how many models it is the average of."""
    found = {}
    for name, module in model.named_modules():
        counter = getattr(module, "n_averaged", None)
        if (
            isinstance(counter, Tensor)
            and counter.numel() == 1
            and isinstance(getattr(module, "module", None), nn.Module)
        ):
            found[f"{name}.module." if name else "module."] = int(counter)
    return found


def _layer(
    name: str, module: nn.Module, state: LayerState | None, optimizer: torch.optim.Optimizer | None
) -> ModelLayer:
    affine = [p for key in ("weight", "bias") if isinstance(p := getattr(module, key, None), nn.Parameter)]
    return ModelLayer(
        name=name,
        kind=type(module).__name__,
        channels=channels_of(module),
        momentum=getattr(module, "momentum", None),
        eps=float(getattr(module, "eps", 0.0)),
        training=module.training,
        frozen=is_frozen(module),
        updates=state is not None
        and bool(getattr(module, "track_running_stats", True))
        and (not is_frozen(module) or bool(getattr(module, "moves_statistics", False))),
        affine_trains=any(parameter.requires_grad for parameter in affine) if affine else None,
        decay=None if optimizer is None else _decay(module, optimizer),
        state=state,
    )


def _decay(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    by_parameter = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    own = module.named_parameters(recurse=False)
    return {name: by_parameter[id(parameter)] for name, parameter in own if id(parameter) in by_parameter}


def _example(inputs: Inputs) -> Any:  # noqa: ANN401 - a batch may be anything
    if inputs.example is not None or inputs.data is None:
        return inputs.example
    for batch in inputs.data:
        return batch
    raise UsageError("data: it must hold at least one batch, got none.")


def _executions(
    model: nn.Module,
    example: Any,  # noqa: ANN401 - a batch may be anything
    modules: Mapping[str, nn.Module],
    *,
    few: bool,
) -> dict[str, Execution]:
    """Run the example and return what it shows; a few samples of it do, if the model takes a cut batch."""
    batch = next(batches_of([example], model))
    with untouched(model), torch.no_grad(), said("forward must run on the example"):
        model.eval()
        if few:
            with suppress(Exception):
                return executions(
                    model, execute(model, first_samples(batch, _EXAMPLE_SAMPLES), modules.values()), modules
                )
        return executions(model, execute(model, batch, modules.values()), modules)


def _with_data(
    model: nn.Module, modules: Mapping[str, nn.Module], evidence: ModelEvidence, inputs: Inputs, data: Iterable[Any]
) -> ModelEvidence:
    passes = _Passes(model, modules, inputs)
    seen, usable = passes.over("data", data)
    shuffled = passes.over_shuffled("data", usable)
    reference, trained_on, train_shuffled = usable, _NOTHING, _NOTHING
    if inputs.train_data is not None:
        trained_on, reference = passes.over("train_data", inputs.train_data)
        train_shuffled = passes.over_shuffled("train_data", reference)
    dropped = _NOTHING
    if any(layer.execution is not None and layer.execution.dropout is not None for layer in evidence.layers):
        dropped, _ = passes.over("data with dropout on", reference, dropout=True)
    gradients = _gradients(model, evidence, inputs, usable)
    layers = tuple(
        _with_gap(
            replace(
                layer,
                data=seen.get(layer.name),
                train_data=trained_on.get(layer.name),
                shuffled=shuffled.get(layer.name),
                train_shuffled=train_shuffled.get(layer.name),
                dropped=dropped.get(layer.name),
                gradient=gradients.get(layer.name),
            )
        )
        for layer in evidence.layers
    )
    found = replace(evidence, layers=layers, notes=tuple(passes.notes))
    with said("forward must run on every batch of data"):
        found = replace(found, output_gap=_output_gap(model, usable), mixing=_mixing(model, usable, found))
    if inputs.metric is None:
        return found
    train_data = None if inputs.train_data is None else reference
    return measure(model, modules, found, inputs.metric, data, train_data, usable)


_NOTHING: Mapping[str, Observed] = {}


@dataclass
class _Passes:
    """Runs a model over data sets, and notes what could not be used."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    inputs: Inputs
    notes: list[str] = field(default_factory=list)
    batches: Counter[str] = field(default_factory=Counter)

    def over_shuffled(self, what: str, data: Iterable[Any]) -> Mapping[str, Observed]:
        """Return what every layer gets when samples are dealt into batches at random; nothing if they cannot be."""
        with suppress(UsageError):
            return self.over(f"shuffled {what}", dealt(data, self.batches[what]))[0]
        return _NOTHING

    def over(
        self, what: str, data: Iterable[Any], *, dropout: bool = False
    ) -> tuple[Mapping[str, Observed], Iterable[Any]]:
        """Return what every layer got, and the data without the batches that have no batch statistics."""
        short: set[int] = set()

        def advance() -> None:
            self.batches[what] += 1
            self.inputs.advance(f"observing {what}")

        with said(f"forward must run on every batch of {what}"):
            seen = observe(self.model, self.modules, data, dropout=dropout, advance=advance, skipped=short)
        if not short:
            return seen, data
        batches = counted(len(short), "batch", "batches")
        self.notes.append(f"{what}: {batches} of one value per channel left out: no batch statistics")
        return seen, Without(data, short)


def _with_gap(layer: ModelLayer) -> ModelLayer:
    if layer.data is None or layer.state is None or layer.frozen:
        return layer
    once = layer.execution is None or layer.execution.calls == 1
    shuffled = layer.shuffled if once else None  # the calls of a shared layer differ, and not by chance
    running = RunningStatistics(
        mean=layer.state.running_mean,
        var=layer.state.running_var,
        dtype=layer.state.dtype,
        momentum=layer.momentum,
        eps=layer.eps,
    )
    return replace(layer, gap=layer_gap(running, layer.data, layer.train_data, layer.dropped, shuffled))


def _output_gap(model: nn.Module, data: Iterable[Any]) -> OutputGap | None:
    """Compare the outputs of the whole network with running statistics and with batch statistics."""
    square = total = spread = 0.0
    broken = False
    with untouched(model), torch.no_grad():
        model.eval()
        for batch in islice(batches_of(data, model), _OUTPUT_BATCHES):
            running = _outputs(model, batch)
            with impose_batch_statistics(model):
                by_batch = _outputs(model, batch)
            for left, right in zip(running, by_batch, strict=False):
                if left.shape != right.shape or not bool(right.isfinite().all()):
                    continue
                broken |= not bool(left.isfinite().all())
                square += float((left - right).square().nan_to_num(posinf=0.0).sum())
                spread += float((right - right.mean(0, keepdim=True)).square().sum())
                total += right.numel()
    if not total or not spread > 0:
        return None
    return OutputGap(relative=(square / spread) ** 0.5, not_finite=broken)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:  # noqa: ANN401
    return [t.detach().cpu().to(torch.float64) for t in tensors_in(run_batch(model, batch)) if t.is_floating_point()]


def _mixing(model: nn.Module, data: Iterable[Any], evidence: ModelEvidence) -> float | None:
    """Return how much the output of a sample in eval mode depends on the samples beside it."""
    batch = next(iter(batches_of(data, model)), None)
    size = samples_in(batch)
    if size < 2 or any(layer.state is None for layer in evidence.layers):
        return None
    half = size // 2
    part = first_samples(batch, half)
    with untouched(model), torch.no_grad():
        whole, again = _outputs(model.eval(), batch), _outputs(model, batch)
        try:
            alone = _outputs(model, part)
        except Exception:
            return None
    if any(not torch.equal(left, right) for left, right in zip(whole, again, strict=True)):
        return None
    changes = [
        float((left[:half] - right).abs().max() / left.std().clamp(min=1e-12))
        for left, right in zip(whole, alone, strict=False)
        if left.dim() and left.size(0) == size and left[:half].shape == right.shape and left.numel() > 1
        if bool(left.isfinite().all()) and bool(right.isfinite().all())
    ]
    return max(changes, default=None)


def _gradients(model: nn.Module, evidence: ModelEvidence, inputs: Inputs, data: Iterable[Any]) -> dict[str, Gradient]:
    """Return the gradient of the loss at the weights of every layer's producer, on the first batch."""
    if inputs.loss is None:
        return {}
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
    with untouched(model), torch.enable_grad(), said("loss must be a scalar of model and batch"):
        model.eval()
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
