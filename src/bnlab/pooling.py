"""Pools the BN statistics of several states of one network: ranks, federated clients, models of a soup.

The variance of all values together is the mean of the variances plus the variance of the means (the law of total
variance). An average of the running variances alone leaves the second part out.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path as FilePath
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.errors import BnlabWarning, UsageError
from bnlab.functional.streaming import merged_moments
from bnlab.observe.files.checkpoint import named_errors
from bnlab.observe.files.state_leaves import (
    Leaf,
    Path,
    StateLeaves,
    StatisticsPaths,
    is_of_optimizer,
    leaves_of,
    with_leaves,
)
from bnlab.observe.files.states_survey import FEW, StatesSurvey, values_of
from bnlab.wording import enumerated, listed

__all__ = ["Pooled", "Rest", "pool", "pooled_states"]

Rest = Literal["average", "first"]


def pool(
    states: Iterable[Mapping[str, Any]], counts: Sequence[float] | None = None, *, rest: Rest = "average"
) -> dict[str, Any]:
    """Pool the BN statistics of several states of one network by the law of total variance.

    mean = sum w_i m_i / sum w_i and var = sum w_i (v_i + (m_i - mean)^2) / sum w_i, in float64. Each running variance
    counts as the variance of its state, as it stands: Bessel's correction is neither undone nor repeated, because
    weights need not be numbers of values. The result is exact for population variances. For unbiased variances of n_i
    values with the weights n_i, it is (sum v_i - var) / (N - 1) above the unbiased variance of all N values together.

    Args:
        states: State dicts of one architecture: tensors or numpy arrays by name, also inside other containers, with or
            without the prefixes of wrappers. They do not change. A sequence that loads a state when it is indexed
            keeps two in memory at a time, the first and another; every state is loaded twice.
        counts: One positive weight per state, such as its number of samples. None takes ``num_batches_tracked``, layer
            by layer. A layer that was never updated then weighs nothing, and where a state has no counter above 0 all
            states weigh the same.
        rest: "average" averages all other floating tensors with the same weights (None: the sums of the counters of
            the layers), and takes integers, booleans and what an optimizer keeps from the first state. "first" takes
            everything but the statistics from the first state.

    Returns:
        A state dict with the containers, names, dtypes and devices of the first state, and with the sums of the
        counters.

    Raises:
        NoBatchNorm: If the states hold no BN layer.
        UsageError: If an argument is wrong, the states do not fit each other, statistics are not finite, or a variance
            is negative.

    Warns:
        BnlabWarning: Once, if the caller should know which weights were used, that a layer was never updated, that
            tensors come from the first state although they differ, or that the other tensors differ, so that the pooled
            statistics are those of no one network.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1, which this applies state by state.

    Example:
        >>> import bnlab
        >>> a = {"bn.running_mean": torch.tensor([0.0]), "bn.running_var": torch.tensor([1.0])}
        >>> b = {"bn.running_mean": torch.tensor([4.0]), "bn.running_var": torch.tensor([1.0])}
        >>> bnlab.pool([a, b], [3, 1])
        {'bn.running_mean': tensor([1.]), 'bn.running_var': tensor([4.])}
    """
    pooled = pooled_states(_checked(states), counts, rest=rest)
    if pooled.notes:
        warnings.warn(f"pool: {' '.join(pooled.notes)}", BnlabWarning, stacklevel=2)
    state: dict[str, Any] = pooled.state
    return state


@dataclass(frozen=True)
class Pooled:
    """A pooled state, and what the caller should know about it.

    Attributes:
        state: The pooled state, with the containers of the first one.
        leaves: The tensors of the first state and its BN layers.
        weights: Which weights the layers have: "counts", "num_batches_tracked" or "equal".
        notes: Sentences that the user should read.
    """

    state: Any
    leaves: StateLeaves
    weights: str
    notes: tuple[str, ...]


def pooled_states(
    states: Sequence[object],
    counts: Sequence[float] | None = None,
    *,
    rest: Rest = "average",
    labels: Sequence[str] | None = None,
) -> Pooled:
    """Pool states as `pool` does, and return notes in place of a warning.

    Args:
        states: As for `pool`; the tensors may be those of files that are not read yet. Each is indexed twice.
        counts: As for `pool`.
        rest: As for `pool`.
        labels: The paths of the files that the states come from; None for states in memory.

    Raises:
        NoBatchNorm, UsageError: As `pool` does.
    """
    if not len(states):
        raise UsageError("pool: states must hold at least one state dict, got none.")
    if rest not in ("average", "first"):
        raise UsageError(f"pool: rest must be 'average' or 'first', got {rest!r}.")
    known = None if counts is None else _weights_of(counts, len(states))
    survey = StatesSurvey([f"pool: states[{index}]" for index in range(len(states))] if labels is None else labels)

    def leaves(index: int) -> StateLeaves:
        state = states[index]
        with nullcontext() if labels is None else named_errors(FilePath(labels[index])):
            return leaves_of(state)

    for index in range(len(states)):
        survey.add(index, leaves(index))
    weights = _weights(survey, known)
    merging = _Merging(survey, weights, rest)
    for index in range(len(states)):
        merging.add(index, leaves(index))
    tensors = merging.tensors()
    first = survey.first
    state = with_leaves(states[0], {first.paths[bare]: tensor for bare, tensor in tensors.items()})
    return Pooled(state, first, weights.kind, (*weights.notes, *_notes_on_layers(survey), *merging.notes()))


def _checked(states: Iterable[Mapping[str, Any]]) -> Sequence[object]:
    """Return the states as a sequence, and refuse what is no state dict."""
    if isinstance(states, (Mapping, nn.Module, str, PurePath)) or not isinstance(states, Iterable):
        raise UsageError(
            f"pool: states must be a list of state dicts, got {_kind(states)}. Pass bnlab.pool([a, b], counts=[3, 1])."
        )
    sequence: Sequence[object] = states if isinstance(states, Sequence) else list(states)
    for index, state in enumerate(sequence):
        if isinstance(state, nn.Module):
            raise UsageError(
                f"pool: states[{index}] must be a state dict, got the module {_kind(state)}. Pass model.state_dict()."
            )
        if isinstance(state, (str, PurePath)) or not isinstance(state, (Mapping, list, tuple)):
            raise UsageError(
                f"pool: states[{index}] must be a state dict, got {_kind(state)}. Load it with torch.load(path, "
                "weights_only=True), or run: bnlab pool A B --output PATH."
            )
    return sequence


def _kind(value: object) -> str:
    return type(value).__name__


def _weights_of(counts: Sequence[float], states: int) -> list[float]:
    """Return the weights that the caller passed.

    Raises:
        UsageError: If they are not one finite number above 0 for each state.
    """
    if isinstance(counts, (str, bytes, Mapping)) or not isinstance(counts, Iterable):
        raise UsageError(f"pool: counts must be one number per state, got {_kind(counts)}. Pass counts=[3, 1].")
    values = [
        value.item() if isinstance(value, (Tensor, np.generic)) and _is_single(value) else value for value in counts
    ]
    if len(values) != states:
        raise UsageError(f"pool: counts must be one number per state, got {len(values)} for {states} states.")
    for value in values:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 < value <= sys.float_info.max:
            raise UsageError(
                f"pool: counts must be finite numbers above 0, got {value!r}. Leave out a state without values."
            )
    weights = [float(value) for value in values]
    if math.isinf(sum(weights)):
        raise UsageError(f"pool: counts must have a finite sum, got {weights}.")
    return weights


def _is_single(value: Tensor | np.generic) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


@dataclass(frozen=True)
class _Weights:
    """The weights of the states.

    Attributes:
        layers: For each BN layer by the path of its mean: one weight per state, which broadcasts to the statistics.
        rest: One weight per state for all other tensors.
        kind: "counts", "num_batches_tracked" or "equal".
        notes: Sentences that the user should read.
    """

    layers: Mapping[Path, Sequence[Tensor]]
    rest: Sequence[float]
    kind: str
    notes: tuple[str, ...] = ()


def _weights(survey: StatesSurvey, known: Sequence[float] | None) -> _Weights:
    """Return the weights of the states.

    Args:
        survey: The counters.
        known: The weights that the caller passed; None for the counters.
    """
    states = len(survey.labels)
    layers = survey.first.layers
    if known is not None:
        fixed = [torch.tensor(weight, dtype=torch.float64) for weight in known]
        return _Weights({layer.mean: fixed for layer in layers}, known, "counts")
    equal = [torch.ones((), dtype=torch.float64)] * states
    served: dict[Path, Sequence[Tensor]] = {}
    for layer in layers:
        counters = _serving(survey.counters[layer.mean], survey.idle[layer.mean])
        if counters is not None:
            served[layer.mean] = counters
    sums = [sum(float(counters[index].sum()) for counters in served.values()) for index in range(states)]
    return _Weights(
        {layer.mean: served.get(layer.mean, equal) for layer in layers},
        sums if served and all(sums) else [1.0] * states,
        "num_batches_tracked" if served else "equal",
        tuple(_notes_on_counters(survey, served)) if states > 1 else (),
    )


def _serving(counters: Sequence[Tensor | None], idle: Sequence[bool]) -> Sequence[Tensor] | None:
    """Return the counters if they can be weights: all above 0 but those of layers that were never updated."""
    serving = [counter for counter in counters if counter is not None]
    can_serve = len(serving) == len(counters) and all(
        is_idle or bool(((counter > 0) & counter.isfinite()).all())
        for counter, is_idle in zip(serving, idle, strict=True)
    )
    return serving if can_serve and not all(idle) else None


def _notes_on_counters(survey: StatesSurvey, served: Mapping[Path, Sequence[Tensor]]) -> Iterator[str]:
    layers = survey.first.layers
    for layer in layers:
        counters = served.get(layer.mean, ())
        if any(not torch.equal(one, counters[0]) for one in counters):
            weights = [f"{float(one.mean()):.15g}" for one in counters]
            shown = listed(weights, 8)
            yield f"The weights are num_batches_tracked ({layer.name}: {shown}); counts (--weights) states others."
            break
    names = [layer.name for layer in layers if layer.mean not in served and not all(survey.idle[layer.mean])]
    if names:
        yield (
            f"All states weigh the same in {enumerated(names, FEW)}, because num_batches_tracked is not above 0 in "
            "every state; counts (--weights) states other weights."
        )


def _notes_on_layers(survey: StatesSurvey) -> Iterator[str]:
    """Yield sentences about layers that one of the states never updated, and about what is no BN layer."""
    idle: dict[int, list[str]] = {}
    for layer in survey.first.layers:
        flags = survey.idle[layer.mean]
        for index in [index for index, is_idle in enumerate(flags) if is_idle and not all(flags)]:
            idle.setdefault(index, []).append(layer.name)
    for index, names in idle.items():
        yield (
            f"{survey.labels[index].removeprefix('pool: ')} never updated the statistics of {enumerated(names, FEW)}, "
            "which are 0 and 1 with the counter 0."
        )
    for name, reason in survey.first.left_alone[:FEW]:
        yield f"{name} is not pooled as a BN layer: it {reason}."


class _Merging:
    """The tensors that are pooled so far: float64 accumulators, or values of the first state."""

    def __init__(self, survey: StatesSurvey, weights: _Weights, rest: Rest) -> None:
        self._labels = survey.labels
        self._first = survey.first
        self._weights = weights
        self._averages = rest == "average"
        self._of_layers = {path for layer in survey.first.layers for path in layer.all}
        self._moments: dict[Path, tuple[Tensor, Tensor, Tensor]] = {}
        self._counters: dict[Path, Tensor] = {}
        self._others: dict[Path, Tensor] = {}
        self._total = 0.0
        self._differ = False
        self._of_first: list[str] = []
        self._unread: list[str] = []
        self._label_of_first = survey.first_label

    def add(self, index: int, leaves: StateLeaves) -> None:
        """Take in the next state.

        Raises:
            UsageError: If a tensor that is averaged does not fit, or is not finite where others are.
        """
        for layer in self._first.layers:
            self._add_layer(index, layer, leaves)
        weight = self._weights.rest[index]
        self._total += weight
        for path in self._first.tensors:
            if path not in self._of_layers:
                self._add_other(index, path, leaves.tensors.get(path), weight / self._total)

    def notes(self) -> Iterator[str]:
        """Yield sentences about tensors that differ between the states."""
        if self._unread:
            names = enumerated(self._unread, FEW)
            yield f"{names}: sparse, quantized or foreign, and taken from {self._label_of_first}."
        if self._of_first:
            of_first = sorted(set(self._of_first))
            yield (
                f"{enumerated(of_first, FEW)} {'differs' if len(of_first) == 1 else 'differ'} between the states and "
                f"{'comes' if len(of_first) == 1 else 'come'} from {self._label_of_first}."
            )
        if self._differ:
            weights = "averaged weights" if self._averages else "the weights of one state"
            yield (
                "The other tensors differ between the states, and pooled statistics are not those of "
                f"{weights}: recompute them before you use the model, bnlab.recalibrate(model, data)."
            )

    def tensors(self) -> dict[Path, object]:
        """Return the pooled tensors by their bare paths, each of the kind, dtype and device of the first state.

        Raises:
            UsageError: If the sum of the counters is beyond the range of their dtype.
        """
        pooled = dict(self._others)
        for layer in self._first.layers:
            count, mean, m2 = self._moments.pop(layer.mean)
            pooled[layer.mean], pooled[layer.var] = mean, m2 / count
        pooled |= self._counters
        return {path: _like(pooled.pop(path), self._first.tensors[path]) for path in list(pooled)}

    def _add_layer(self, index: int, layer: StatisticsPaths, leaves: StateLeaves) -> None:
        mean, var = (self._values(index, path, leaves.tensors[path]) for path in (layer.mean, layer.var))
        assert mean is not None  # the survey refused others
        assert var is not None
        mean, var = mean.to(torch.float64), var.to(torch.float64)
        weight = self._weights.layers[layer.mean][index]
        before = self._moments.get(layer.mean, (weight * 0, mean * 0, mean * 0))
        self._moments[layer.mean] = merged_moments(*before, weight, mean, weight * var)
        counter = None if layer.counter is None else leaves.tensors.get(layer.counter)
        values = None if counter is None or layer.counter is None else self._values(index, layer.counter, counter)
        if layer.counter is not None and values is not None:
            self._count(index, layer, layer.counter, values)

    def _count(self, index: int, layer: StatisticsPaths, path: Path, values: Tensor) -> None:
        wide = values.to(torch.float64 if values.is_floating_point() else torch.int64)
        if path not in self._counters:
            self._counters[path] = wide.clone()
            return
        dtype = getattr(torch, str(self._first.tensors[path].dtype).removeprefix("torch."))
        total = self._counters[path] + wide
        limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        if (total < self._counters[path]).any() or (total > limit).any():
            raise UsageError(
                f"{self._labels[index]}: num_batches_tracked of {layer.name} must sum to at most {limit} over the "
                "states, got more. Set the counters to 0 first, and pass counts (--weights)."
            )
        self._counters[path] = total

    def _add_other(self, index: int, path: Path, leaf: Leaf | None, share: float) -> None:
        """Take in a tensor that is no statistic of a BN layer."""
        if leaf is None and self._averages and not is_of_optimizer(path):
            raise self._misfit(index, path, "got none")
        values = None if leaf is None else self._values(index, path, leaf)
        if index == 0:
            if values is not None:
                self._others[path] = _wide(values) if self._is_averaged(path, values) else values.clone()
            elif self._averages and not is_of_optimizer(path):
                self._unread.append(_dotted(path))
            return
        before = self._others.get(path)
        if values is None or before is None or values.shape != before.shape:
            if before is not None and values is not None and self._averages and not is_of_optimizer(path):
                raise self._misfit(index, path, f"got the shape {tuple(values.shape)}, not {tuple(before.shape)}")
            self._take_first(path, before)
            return
        is_equal = _equal(before, values.to(before.dtype))
        if is_equal.all():
            return
        if not self._is_averaged(path, before):
            self._take_first(path, before)
            return
        self._differ = True
        self._others[path] = self._averaged(index, path, before, values.to(before.dtype), share)

    def _averaged(self, index: int, path: Path, before: Tensor, values: Tensor, share: float) -> Tensor:
        """Return the average with one more tensor. Equal values stay, also those that are not finite."""
        is_equal = _equal(before, values)
        is_wrong = ~(before.isfinite() & values.isfinite()) & ~is_equal
        if is_wrong.any():
            at = (index, values) if (~values.isfinite() & is_wrong).any() else (0, before)
            number = at[1][~at[1].isfinite() & is_wrong][0].item()
            raise UsageError(
                f"{self._labels[at[0]]}: {_dotted(path)} must be finite to be averaged, got {number}. Leave the state "
                "out, or take the other tensors from the first state: rest='first' (--rest first)."
            )
        return torch.where(is_equal, before, before + (values - before) * share)

    def _is_averaged(self, path: Path, values: Tensor) -> bool:
        is_number = values.is_floating_point() or values.is_complex()
        return self._averages and is_number and not is_of_optimizer(path)

    def _take_first(self, path: Path, before: Tensor | None) -> None:
        """Remember that a tensor of the first state stands for others that differ."""
        if is_of_optimizer(path):
            self._of_first.append("the state of the optimizer")
        elif self._averages and before is not None:
            self._of_first.append(_dotted(path))
        elif not self._averages and (before is None or before.is_floating_point() or before.is_complex()):
            self._differ = True

    def _values(self, index: int, path: Path, leaf: Leaf) -> Tensor | None:
        return values_of(leaf, self._labels[index], _dotted(path))

    def _misfit(self, index: int, path: Path, value: str) -> UsageError:
        return UsageError(
            f"{self._labels[index]}: {_dotted(path)} must be a tensor as in "
            f"{self._label_of_first} to be averaged, {value}. Pool states of one architecture, or "
            "take the other tensors from the first state: rest='first' (--rest first)."
        )


def _wide(values: Tensor) -> Tensor:
    """Return a copy of floating or complex values in twice the precision of float32."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64, copy=True)


def _equal(left: Tensor, right: Tensor) -> Tensor:
    """Return where values are equal; NaN equals NaN."""
    if left.is_floating_point():  # torch does not compare float8
        left, right = left.to(torch.float64), right.to(torch.float64)
    return (left == right) | ((left != left) & (right != right))


def _like(values: Tensor, leaf: Leaf) -> object:
    """Return values in the kind, dtype and device of a tensor. What its dtype cannot hold becomes its largest value."""
    dtype: torch.dtype = getattr(torch, str(leaf.dtype).removeprefix("torch."))
    if dtype.is_floating_point and values.dtype != dtype:
        largest = torch.finfo(dtype).max
        values = torch.where(values.isfinite(), values.clamp(-largest, largest), values)
    values = values.to(dtype)
    if isinstance(leaf, np.ndarray):
        return values.numpy()
    return values.to(leaf.device) if isinstance(leaf, Tensor) else values


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
