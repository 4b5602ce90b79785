"""Records what happens to one BN layer from step to step."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.nn.base import BatchNormBase
from bnlab.nn.batch_renorm import BatchRenorm
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.nn.running_update import is_in_backward
from bnlab.observe.training_run import RunLayer, StepOfLayer
from bnlab.watching.forward_passes import ForwardPass, ForwardPasses
from bnlab.watching.inert_copies import HookOfOriginal
from bnlab.watching.once_per_step import is_deferred
from bnlab.watching.owners import weight_and_bias

__all__ = ["Call", "WatchedLayer"]

_is_tracing: Callable[[], object] = torch._C._get_tracing_state  # noqa: SLF001 - what torch.jit.is_tracing reads

_COUNTS = ("updates", "recomputed", "repeated", "without_gradients", "repeated_outside")
_STEPS = 16
"""Number of steps that a layer remembers."""


@dataclass(slots=True)
class Call:
    """One forward pass through a layer.

    Attributes:
        of: The pass of the whole model that it belongs to.
        training: Whether the layer was in train mode.
        updates: Whether it changed the running statistics.
        recomputes: Whether it ran inside a backward pass.
        is_expected: Whether it is meant to change running statistics outside of training.
        count: Values per channel.
        inputs_train: Whether its input requires gradients; None if unknown.
        times: Number of updates: a compiled model hides how often the layer runs.
    """

    of: ForwardPass
    training: bool
    updates: bool
    recomputes: bool
    is_expected: bool
    count: int
    inputs_train: bool | None
    times: int = 1


class WatchedLayer:
    """One BN layer of a watched model, with the evidence on it.

    Args:
        name: Layer path.
        layer: The layer.
        passes: The forward passes of the model.
        sample: Called with this layer and the input of a forward pass that trains, in steps that are sampled.

    Attributes:
        evidence: What the checks judge.
        taken: Number of steps so far, also of those that are not yet evidence.
        order: How many layers have run before it did so first; inf if none of its hooks was called.
        seen: Number of updates in which the hook of the layer was called.
        is_called: Whether that has happened since the last step, with or without an update.
        is_sampled: Whether the next forward pass that trains is sampled.
    """

    def __init__(
        self, name: str, layer: _BatchNorm, passes: ForwardPasses, sample: Callable[[WatchedLayer, Tensor], None]
    ) -> None:
        self.layer = layer
        self.evidence = RunLayer(
            name=name,
            channels=layer.num_features,  # 0 for a lazy layer, until it has run
            kind=type(layer).__name__,
            momentum=layer.momentum,
            has_affine=any(True for _ in layer.parameters(recurse=False)),
            is_fresh=_is_fresh(layer),
            reads_other_ranks=_reads_other_ranks(layer),
            steps=deque(maxlen=_STEPS),
            samples=[],
        )
        self.taken = 0
        self.order = math.inf
        self.seen = 0
        self.is_called = False
        self.is_sampled = False
        self._passes = passes
        self._sample = sample
        self._calls: list[Call] = []
        self._undecided: list[Call] = []
        self._past: list[Call] = []
        self._untrained: list[Tensor] | None = None
        self._passes_at_other_step: int | None = None
        self._handle: Any = None

    @property
    def has_run(self) -> bool:
        """Whether the layer has run since the last step."""
        return bool(self._calls)

    def install(self) -> Any:  # noqa: ANN401 - torch's handle
        """Install the hook, and return its handle."""
        self._handle = self.layer.register_forward_hook(_AfterForward(self), always_call=True)
        return self._handle

    def watch_instead(self, layer: _BatchNorm) -> Any:  # noqa: ANN401 - torch's handle
        """Go on with the layer that has replaced this one in the model, and return the handle of its hook."""
        self._handle.remove()
        self.layer = layer
        self.evidence.kind, self.evidence.momentum = type(layer).__name__, layer.momentum
        self.evidence.reads_other_ranks = _reads_other_ranks(layer)
        self.seen, self._untrained = 0, None
        return self.install()

    def record(self, x: object, output: object) -> None:
        """Record a forward pass with its input and output."""
        layer, of = self.layer, self._passes.current()
        self.evidence.channels = layer.num_features
        of.layers += 1
        if self.order == math.inf:
            self.order = next(self._passes.order)
        if not isinstance(x, Tensor) or x.dim() < 2:
            return
        recomputes = is_in_backward()
        momentum_differs = layer.momentum != self.evidence.momentum
        call = Call(
            of=of,
            training=layer.training,
            updates=self._updates(recomputes),
            recomputes=recomputes,
            is_expected=of.is_expected or (momentum_differs and not of.has_gradients),
            count=0 if _is_tracing() else x.numel() // max(1, x.size(1)),
            inputs_train=x.requires_grad,
        )
        self._keep(call)
        self.is_called = True
        self.seen += call.updates
        if not recomputes and of.has_gradients and of.layers == 1:
            of.follow(output)
        if self.evidence.has_parameters_before is None:
            self.evidence.has_parameters_before = self._passes.has_parameters_before(layer)
        matters = call.updates or (self.evidence.began_training and not layer.training)
        if _is_tracing():
            return  # what is computed here would belong to the traced program
        if self.is_sampled and matters and of.has_gradients and not (recomputes or call.is_expected):
            self.is_sampled = False
            self._sample(self, x)

    def _keep(self, call: Call) -> None:
        """Keep what a step may need: a validation between two steps takes no memory, however long it is."""
        if not (call.updates or call.of.has_gradients):
            return
        last = self._calls[-1] if self._calls else None
        if last is not None and _is_one_validation(last, call):
            last.times += 1
        else:
            self._calls.append(call)

    def add_hidden(self, of: ForwardPass) -> Call | None:
        """Record a pass in which a compiled model ran without calling the hook of the layer.

        Returns:
            What is recorded, for `times` and `updates` to be set when they are known; None if the hook was called.
        """
        if any(call.of is of for call in self._calls):
            return None
        call = Call(of, self.layer.training, False, False, of.is_expected, 0, None, times=0)
        self._calls.append(call)
        return call

    def begin_again(self) -> None:
        """Take the steps so far for a part of the first one: they were those of another optimizer."""
        evidence = self.evidence
        evidence.steps.clear()  # type: ignore[attr-defined] # a deque here
        evidence.windows = evidence.windows_outside = self.taken = 0
        evidence.first_outside = evidence.began_training = None
        self._calls, self._past = [*self._past, *self._calls], []
        self._undecided = []
        self._untrained = None

    def see_other_step(self) -> None:
        """Record that an optimizer steps that does not train this layer: in turn, if the model runs before the next."""
        if self.has_run:
            self._passes_at_other_step = self._passes.begun

    def keep_out(self, batches: int, step: int) -> None:
        """Record batches with an inf or NaN that the layer kept out of its running statistics."""
        evidence = self.evidence
        if batches <= 0 or (evidence.steps and 0 < evidence.steps[-1].count < 2):
            return
        evidence.kept_out += batches
        if evidence.kept_out_step is None:
            evidence.kept_out_step = step

    def take(self, *, keeps: bool = False) -> list[Call]:
        """End a step: return what has happened since the one before, without what was expected.

        Args:
            keeps: Whether to keep it for `begin_again`, because the step may be that of another optimizer.
        """
        if self._passes_at_other_step not in (None, self._passes.begun):
            self.evidence.others_step = True
        self._passes_at_other_step = None
        self.is_called = False
        calls, self._calls = [call for call in self._calls if not call.is_expected], []
        self._past = [*self._past, *calls][-_STEPS:] if keeps else []
        self.taken += 1
        return calls

    def close(self, calls: list[Call], *, skipped: bool, trained_by: frozenset[int] | None, is_frozen: bool) -> None:
        """Turn what has happened in a step into evidence.

        Args:
            calls: What `take` returned at the step.
            skipped: Whether the gradient scaler skipped the step.
            trained_by: The identities of the parameters that the optimizer changes; None for all.
            is_frozen: Whether the layer was frozen at the step.
        """
        evidence = self.evidence
        evidence.is_deferred = evidence.is_deferred or is_deferred(self.layer)
        step = self._step_of(calls, skipped, trained_by, is_frozen)
        if evidence.began_training is None:
            evidence.began_training = step.training
        self._decide()
        self._undecided = [call for call in calls if _is_undecided(call)]
        evidence.steps.append(step)  # type: ignore[attr-defined] # a deque here
        evidence.windows += 1
        if step.outside:
            self._count_outside(step)

    def end(self) -> None:
        """End the run: judge the forward passes that no step follows."""
        calls = [call for call in self._calls if not call.is_expected and not call.recomputes]
        self._decide()
        outside = [call for call in calls if call.updates and not call.of.is_used]
        if outside and not self.evidence.is_over:
            without = sum(call.times for call in outside if not call.of.has_gradients)
            left = sum(call.times for call in outside) - without
            self._count_outside(StepOfLayer(step=self.evidence.windows, without_gradients=without, without_step=left))
        self._calls = [call for call in self._calls if call not in outside]
        self.evidence.is_over = True

    def _updates(self, recomputes: bool) -> bool:
        """Return whether a forward pass changes the running statistics now."""
        layer = self.layer
        if is_deferred(layer):
            return layer.training and not recomputes
        if not (layer.training and layer.track_running_stats) or layer.running_mean is None or layer.momentum == 0:
            return False
        if isinstance(layer, FrozenBatchNorm) and not layer.moves_statistics:
            return False
        return not (recomputes and isinstance(layer, BatchNormBase))

    def _step_of(
        self, calls: list[Call], skipped: bool, trained_by: frozenset[int] | None, is_frozen: bool
    ) -> StepOfLayer:
        counts = dict.fromkeys(_COUNTS, 0)
        backwards: set[int] = set()
        modes: list[bool] = []
        through: list[bool] = []
        count = 0
        for call in calls:
            of, is_used = call.of, call.of.is_used
            if is_used and not call.recomputes:
                modes.append(call.training)
            if not call.updates:
                continue
            if of.has_gradients and call.inputs_train is not None:
                through.append(call.inputs_train)
            if is_used or call.recomputes or not of.has_gradients:
                self._count(call, calls, counts)
                backwards.update(sorted(of.backwards)[:1])  # several losses of one pass are one update
                count = max(count, call.count)
        training = any(modes) if modes else None
        return StepOfLayer(
            step=self.evidence.windows,
            **counts,
            backwards=len(backwards),
            training=training,
            frozen=training is False and is_frozen,
            count=count,
            inputs_train=any(through) if through else None,
            skipped=skipped,
            trains=self._trains(trained_by, moves=any(counts.values())),
        )

    def _count(self, call: Call, calls: list[Call], counts: dict[str, int]) -> None:
        """Add an update to the counts of a step."""
        repeats: list[ForwardPass] = []
        if call.of.repeats:
            updating = {other.of for other in calls if other.updates}
            repeats = [earlier for earlier in call.of.repeats if earlier in updating]
        kind = _kind_of(call, repeats)
        counts[kind] += call.times
        if repeats and kind in {"updates", "without_gradients"}:
            counts["repeated_outside"] += call.times

    def _decide(self) -> None:
        """Count the passes with gradients that no backward pass has used in the step that followed theirs."""
        unused = sum(call.times for call in self._undecided if not call.of.is_used)
        self._undecided = []
        if not unused or not self.evidence.steps:
            return
        last = self.evidence.steps[-1]
        step = dataclasses.replace(last, without_step=unused)
        self.evidence.steps[-1] = step  # type: ignore[index] # a deque here
        if not last.outside:
            self._count_outside(step)

    def _count_outside(self, step: StepOfLayer) -> None:
        self.evidence.windows_outside += 1
        self.evidence.first_outside = self.evidence.first_outside or step

    def _trains(self, trained_by: frozenset[int] | None, *, moves: bool) -> bool:
        """Return whether the weight and bias train, or change by other means, such as an average of another model."""
        own = weight_and_bias(self.layer)
        trains = any(one.requires_grad and (trained_by is None or id(one) in trained_by) for one in own)
        if not trains and own and moves:
            if self._untrained is None:
                self._untrained = [one.detach().clone() for one in own]
            elif not all(torch.equal(old, new) for old, new in zip(self._untrained, own, strict=True)):
                trains = True
                self._untrained = [one.detach().clone() for one in own]
        return trains


class _AfterForward(HookOfOriginal):
    def __init__(self, watched: WatchedLayer) -> None:
        self._watched = watched

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not torch.compiler.is_compiling():
            self._watched.record(args[0] if args else None, output)


def _reads_other_ranks(layer: _BatchNorm) -> bool:
    return isinstance(layer, (nn.SyncBatchNorm, BatchRenorm))


def _is_one_validation(one: Call, other: Call) -> bool:
    """Return whether two calls without gradients count alike."""
    alike = (one.is_expected, one.recomputes) == (other.is_expected, other.recomputes)
    return alike and not (one.of.has_gradients or other.of.has_gradients or one.of.repeats or other.of.repeats)


def _is_undecided(call: Call) -> bool:
    """Return whether a backward pass may still use a call, in the next step."""
    return call.updates and not call.recomputes and call.of.has_gradients and not call.of.is_used


def _kind_of(call: Call, repeats: Sequence[ForwardPass]) -> str:
    """Return what an update counts as; `repeats` are the earlier passes on its input that updated the layer too."""
    if call.recomputes:
        return "recomputed"
    if not call.of.has_gradients:
        return "without_gradients"
    return "repeated" if any(earlier.is_used for earlier in repeats) else "updates"


def _is_fresh(layer: _BatchNorm) -> bool:
    """Return whether the running statistics have their initial values, and no update is counted."""
    mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is not None and is_lazy(mean):
        return True  # the first forward pass makes them
    if mean is None or var is None or mean.is_meta:
        return False
    return bool((mean == 0).all() and (var == 1).all() and (counter is None or counter == 0))
