"""Evidence for the CLEAN and BROKEN cases of the checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnlab.observe.evidence import Floats, Hyperparameters, LayerState, NetworkState, Pruned
from bnlab.observe.gap import RunningStatistics, batch_sums, layer_gap
from bnlab.observe.graph_state import GraphState, LinearNode, NodeMode
from bnlab.observe.model_evidence import Execution, FeatureAxis, Gap, ModelEvidence, ModelLayer, Observed, Producer
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun

__all__ = [
    "executed",
    "folded_graph",
    "healthy",
    "model",
    "model_layer",
    "network",
    "observed",
    "of",
    "run_of",
    "step_of",
    "untrained",
]


def healthy(
    name: str = "bn",
    *,
    running_mean: Sequence[float] = (0.3, -0.7, 0.1, 1.2),
    running_var: Sequence[float] = (0.8, 2.0, 0.4, 1.1),
    weight: Sequence[float] | None = (0.9, 1.1, 1.0, 0.7),
    bias: Sequence[float] | None = (0.0, 0.2, -0.1, 0.05),
    num_batches_tracked: int | None = 1000,
    dtype: str = "float32",
    affine_dtype: str | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    settled: bool = False,
    pruned: Pruned | None = None,
    filter_norms: Sequence[float] | None = None,
    mode: NodeMode | None = None,
) -> LayerState:
    """Return the state of a trained layer with four channels; every part can be replaced."""
    return LayerState(
        name=name,
        running_mean=_column(running_mean),
        running_var=_column(running_var),
        weight=None if weight is None else _column(weight),
        bias=None if bias is None else _column(bias),
        num_batches_tracked=num_batches_tracked,
        dtype=dtype,
        affine_dtype=affine_dtype or dtype,
        hyperparameters=Hyperparameters(momentum, eps, assumed=()),
        settled=settled,
        pruned=pruned,
        filter_norms=None if filter_norms is None else _column(filter_norms),
        mode=mode,
    )


def untrained(name: str = "bn", *, num_batches_tracked: int | None = 0) -> LayerState:
    """Return the state of a new layer, with its initial values."""
    return healthy(
        name,
        running_mean=(0, 0, 0, 0),
        running_var=(1, 1, 1, 1),
        weight=(1, 1, 1, 1),
        bias=(0, 0, 0, 0),
        num_batches_tracked=num_batches_tracked,
    )


def network(*layers: LayerState) -> NetworkState:
    """Return the state of a network with these layers."""
    return NetworkState("", layers)


def of(**changes: object) -> NetworkState:
    """Return a network of one healthy layer with some parts replaced."""
    return network(healthy(**changes))  # type: ignore[arg-type]  # the parts of `healthy`, typed there


def folded_graph(*nodes: LinearNode) -> GraphState:
    """Return the state of a graph with these convolutions and matrix products, and without BN nodes."""
    return GraphState((), 0, nodes)


def executed(
    *,
    calls: int = 1,
    samples: int = 32,
    counts: tuple[int, ...] = (32 * 49,),
    producer: Producer | None = None,
    dropout: str | None = None,
    activation: str | None = "relu",
    pruned: Pruned | None = None,
    features: FeatureAxis | None = None,
) -> Execution:
    """Return the record of an ordinary forward pass; every part can be replaced."""
    return Execution(
        calls=calls,
        samples=samples,
        counts=counts,
        producer=producer,
        dropout=dropout,
        activation=activation,
        pruned=pruned,
        features=features,
    )


def observed(
    *,
    mean: Sequence[float] = (0.3, -0.7, 0.1, 1.2),
    var: Sequence[float] = (0.8, 2.0, 0.4, 1.1),
    batches: int = 20,
    images: int = 640,
    positions: int = 49,
    between: float = 1.0,
    not_finite: int = 0,
    overflowed: int = 0,
    own_error: float = 0.0,
    input_eps: float = 2.0**-23,
    batch_rows: Floats | None = None,
) -> Observed:
    """Return the observation of data with these statistics, which are those of a `healthy` layer by default.

    `between` is the variance of the batch means, relative to the variance that sampling explains. The variance of the
    sample means is a tenth of the variance.
    """
    means, variances = _column(mean), _column(var)
    per_batch = images / batches
    spread = variances / 10
    of_means = between * spread / per_batch
    return Observed(
        batches=batches,
        images=images,
        count=images * positions,
        smallest_count=int(per_batch) * positions,
        mean=means,
        var=variances + of_means,
        within_mean=means,
        within_var=variances,
        batch_mean_var=of_means,
        batch_var_var=between * 0.02 * variances**2 / per_batch,
        image_mean_var=spread,
        image_square_var=0.02 * variances**2,
        moments=_two_halves(images * positions / 2, means, np.sqrt(of_means), variances, batches),
        not_finite=not_finite,
        overflowed=overflowed,
        own_error=own_error,
        input_eps=input_eps,
        batch_rows=batch_rows,
    )


def _two_halves(count: float, means: Floats, deviation: Floats, variances: Floats, batches: int) -> dict[str, Floats]:
    """Return the sums over two halves of the data, whose means are `deviation` below and above the mean of all data."""
    below, above = (
        batch_sums(count, means + sign * deviation, variances, 1 + batches / count, 1e-5) for sign in (-1, 1)
    )
    return {name: below[name] + above[name] for name in below}


def gap_of(layer: LayerState, data: Observed, train_data: Observed | None = None) -> Gap:
    """Return the gap of a layer on data."""
    hyperparameters = layer.hyperparameters
    running = RunningStatistics(
        mean=layer.running_mean,
        var=layer.running_var,
        dtype=layer.dtype,
        momentum=hyperparameters.momentum,
        eps=hyperparameters.eps,
    )
    return layer_gap(running, data, train_data)


def model_layer(name: str = "bn", **changes: object) -> ModelLayer:
    """Return a healthy BN layer of a model that was run on data; every part can be replaced."""
    state = changes.pop("state", healthy(name))
    data = changes.pop("data", observed())
    train_data = changes.pop("train_data", observed())
    assert state is None or isinstance(state, LayerState)
    assert data is None or isinstance(data, Observed)
    assert train_data is None or isinstance(train_data, Observed)
    parts: dict[str, object] = {
        "kind": "BatchNorm2d",
        "channels": 4,
        "momentum": 0.1 if state is None else state.hyperparameters.momentum,
        "eps": 1e-5,
        "training": True,
        "execution": executed(),
        "gap": None if state is None or data is None else gap_of(state, data, train_data),
        **changes,
    }
    return ModelLayer(name=name, state=state, data=data, train_data=train_data, **parts)  # type: ignore[arg-type]


def model(*layers: ModelLayer, **network: object) -> ModelEvidence:
    """Return the evidence of a model with these layers."""
    return ModelEvidence(layers=layers or (model_layer(),), **network)  # type: ignore[arg-type]


def step_of(step: int = 0, **changes: object) -> StepOfLayer:
    """Return an ordinary step: one update by one batch of 1568 values per channel; every part can be replaced."""
    usual: dict[str, object] = {"updates": 1, "backwards": 1, "training": True, "count": 1568, "inputs_train": True}
    return StepOfLayer(step=step, **{**usual, **changes})  # type: ignore[arg-type]


def run_of(*steps: StepOfLayer, **changes: object) -> TrainingRun:
    """Return a run of one layer, which began in train mode, with these steps; every part of the layer can be replaced.

    Without steps it makes ten ordinary ones.
    """
    steps = steps or tuple(map(step_of, range(10)))
    outside = [step for step in steps if step.outside]
    parts: dict[str, object] = {
        "name": "bn",
        "channels": 4,
        "kind": "BatchNorm2d",
        "momentum": 0.1,
        "windows": len(steps),
        "windows_outside": len(outside),
        "first_outside": outside[0] if outside else None,
        "began_training": True,
        "has_parameters_before": True,
        **changes,
    }
    return TrainingRun(layers=(RunLayer(steps=steps, **parts),))  # type: ignore[arg-type]


def _column(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)
