"""Builds the records of all layers in a diagnosis, with their numbers, whether or not they have findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from bnlab.observe.evidence import Evidence, Floats, LayerState, NetworkState
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import LayerRecord, Range

__all__ = ["layer_records"]


def layer_records(evidence: Evidence, model: ModelEvidence | None, *, per_channel: bool) -> tuple[LayerRecord, ...]:
    """Return one record per layer, in execution order if it is known, else in the order of the file.

    Args:
        evidence: The stored numbers.
        model: The evidence on a model; None if the target is a file.
        per_channel: Whether each record holds a value for each channel.
    """
    records = [record for network in evidence.networks for record in _of_network(network)]
    if model is not None:
        records = list(_with_observations(records, model))
    return tuple(_with_channels(records, evidence, model) if per_channel else records)


def _of_network(network: NetworkState) -> Iterable[LayerRecord]:
    columns = (network.running_mean, network.running_var, network.gain)
    means, variances, gains = (network.ranges(column) for column in columns)
    for layer, mean, var, gain in zip(network.layers, means, variances, gains, strict=True):
        yield LayerRecord(
            name=layer.name,
            network=network.name,
            channels=layer.channels,
            dtype=layer.dtype,
            affine=layer.weight is not None or layer.bias is not None,
            num_batches_tracked=layer.num_batches_tracked,
            momentum=layer.hyperparameters.momentum,
            eps=layer.hyperparameters.eps,
            assumed=layer.hyperparameters.assumed,
            running_mean=mean and Range(*mean),
            running_var=var and Range(*var),
            gain=gain and Range(*gain),
            kind=layer.kind,
            training=layer.training,
        )


def _with_observations(records: Sequence[LayerRecord], model: ModelEvidence) -> Iterable[LayerRecord]:
    """Yield the records of the layers of a model in execution order, with the evidence on each of them."""
    known = {record.name: record for record in records}
    for layer in model.layers:
        record = known.pop(layer.name, None) or _without_statistics(layer)
        execution, gap = layer.execution, layer.gap
        producer = None if execution is None else execution.producer
        ran = "example" not in model.missing
        yield dataclasses.replace(
            record,
            calls=execution.calls if execution is not None else 0 if ran else None,
            inputs=() if producer is None else (producer.name,),
            gap=None if gap is None else {**gap.by_cause, "total": gap.square},
        )
    yield from known.values()


def _with_channels(
    records: Sequence[LayerRecord], evidence: Evidence, model: ModelEvidence | None
) -> Iterable[LayerRecord]:
    """Yield the records with a value for each channel."""
    states = {layer.name: layer for network in evidence.networks for layer in network.layers}
    observed = {} if model is None else {layer.name: layer for layer in model.layers}
    for record in records:
        columns = _stored(states.get(record.name)) | _expected(observed.get(record.name))
        per_channel = {name: tuple(values.tolist()) for name, values in columns.items()}
        yield dataclasses.replace(record, per_channel=per_channel or None)


def _stored(state: LayerState | None) -> dict[str, Floats]:
    if state is None:
        return {}
    columns = {
        "running_mean": state.running_mean,
        "running_var": state.running_var,
        "weight": state.weight,
        "bias": state.bias,
    }
    return {name: values for name, values in columns.items() if values is not None}


def _expected(layer: ModelLayer | None) -> dict[str, Floats]:
    """Return the expected values of the running statistics, and the standard deviation of their chance differences."""
    if layer is None:
        return {}
    columns = {} if layer.gap is None else {"gap": layer.gap.per_channel}
    source, reference = ("data", layer.data) if layer.train_data is None else ("train_data", layer.train_data)
    if reference is None:
        return columns
    mean_noise, var_noise = reference.buffer_noise(layer.momentum)
    return columns | {
        f"{source}_mean": reference.within_mean,
        f"{source}_mean_error": np.sqrt(mean_noise),
        f"{source}_var": reference.within_var,
        f"{source}_var_error": np.sqrt(var_noise),
    }


def _without_statistics(layer: ModelLayer) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        network="",
        channels=layer.channels,
        dtype="none",
        affine=layer.affine_trains is not None,
        num_batches_tracked=None,
        momentum=layer.momentum,
        eps=layer.eps,
        assumed=(),
        running_mean=None,
        running_var=None,
        gain=None,
    )
