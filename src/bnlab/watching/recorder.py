"""Records a training run: hooks on the model, its BN layers and its optimizers turn what happens into evidence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer

from bnlab.observe.discover import batch_norm_layers, why_frozen
from bnlab.observe.training_run import RankSpread, Sample, TrainingRun
from bnlab.observe.transfers import Pending
from bnlab.observe.wrappers import is_compiled, unwrapped
from bnlab.uninterrupted import SignalsHeld, finishes
from bnlab.watching.buffers import Buffers
from bnlab.watching.forward_passes import ForwardPass, ForwardPasses
from bnlab.watching.owners import Owners
from bnlab.watching.ranks import Ranks
from bnlab.watching.sampling import Sampler, is_sampled
from bnlab.watching.skipped_steps import SkippedSteps
from bnlab.watching.watched_layer import Call, WatchedLayer

__all__ = ["Recorder"]

_LONGEST_WAIT = 1_000
"""Number of steps after which the host reads what waits on a device, whatever the interval of the samples."""


class Recorder:
    """The evidence on a training run, from the installation of its hooks on.

    Args:
        model: The model that the loop calls.
        optimizer: The optimizer that trains it; None for every one that has its parameters.
        scaler: The gradient scaler, or None.
        every: Number of steps between two samples.
        on_step: Called after every step.
        on_sample: Called with a layer and a sample of it.

    Attributes:
        step: Number of steps; where several optimizers step in turn, those of the first one.
        latest: The optimizer whose steps are counted; None before the first step.
        passes: The forward passes of the model.
        layers: The BN layers, in the order of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        scaler: torch.amp.GradScaler | None,
        every: int,
        on_step: Callable[[], None],
        on_sample: Callable[[WatchedLayer, Sample], None],
    ) -> None:
        self.step = 0
        self.latest: Optimizer | None = None
        self._model, self._inner = model, unwrapped(model)
        self._every = every
        self._on_step, self._on_sample = on_step, on_sample
        self._owners = Owners(self._inner, optimizer)
        self.passes = ForwardPasses(self._end_pass)
        self._closing = Pending()  # the ends of steps, which keep their order
        self._reading = Pending()
        named = batch_norm_layers(model)
        self.layers = [WatchedLayer(name, layer, self.passes, self._take_sample) for name, layer in named.items()]
        self._modules = [*named.values()]  # `_follow_replaced` changes it for all that hold it
        self._counters = Buffers(self._modules, self._closing)
        self._buffers = Buffers(self._modules, self._reading)
        self._samplers = [Sampler(self._reading) for _ in self.layers]
        self._ranks = Ranks(self._modules, self._noise_of, self._take_spread)
        self._steps = SkippedSteps(self._after_step, None, scaler)
        self._signals = SignalsHeld()
        self._handles: list[Any] = []
        self._counting: list[Any] = []
        self._is_compiled = any(map(_is_compiled, model.modules()))
        self._counts: dict[int, float] = {}
        self._not_finite: set[int] = set()
        self._kept_out: dict[int, float] = {}

    @property
    def run(self) -> TrainingRun:
        """The evidence so far."""
        return TrainingRun(layers=tuple(watched.evidence for watched in self.layers))

    def install(self) -> None:
        """Begin to record."""
        try:
            self._signals.__enter__()
            self._install()
        except BaseException:
            self.remove()
            raise

    @finishes
    def remove(self) -> None:
        """Remove everything that `install` has put in place. A second call does nothing."""
        try:
            self._stop_counting()
            while self._handles:
                self._handles.pop().remove()
            self._steps.remove()
        finally:
            self._signals.__exit__(None, None, None)

    def read(self) -> None:
        """Read from the devices what has not been read yet."""
        self._closing.settle()
        self._reading.settle()
        self._ranks.receive()

    def end(self) -> None:
        """Judge the forward passes that no step follows."""
        self.read()
        for watched in self.layers:
            watched.end()

    @finishes
    def _install(self) -> None:
        self._counters.counters(self._counts.update)
        self._buffers.kept_out(self._kept_out.update)
        self._buffers.not_finite(lambda counts: self._not_finite.update(index for index, n in counts.items() if n))
        self._handles += [install() for install in self.passes.hooks_of(self._model)]
        self._counting += [install() for install in self.passes.counting_hooks_of(self._inner)]
        self._handles += [watched.install() for watched in self.layers]
        for watched in self.layers:
            watched.is_sampled = is_sampled(0, self._every)
        self._steps.install()

    def _stop_counting(self) -> None:
        while self._counting:
            self._counting.pop().remove()
        self.passes.stop_counting()

    def _end_pass(self, ended: ForwardPass) -> None:
        """Record the layers that compiled code has run without their hooks."""
        if not (self._is_compiled or ended.layers == 0):
            return
        hidden = {index: call for index, watched in enumerate(self.layers) if (call := watched.add_hidden(ended))}
        if hidden:
            self._counters.counters(partial(self._reveal, hidden, [watched.seen for watched in self.layers]))

    def _reveal(self, hidden: dict[int, Call], seen: list[int], counts: dict[int, float]) -> None:
        """Set how often layers were updated without their hooks, from the growth of their counters."""
        unseen = {index: count - seen[index] for index, count in counts.items()}
        for index, call in hidden.items():
            growth = int(unseen.get(index, 0) - self._counts.get(index, 0)) if call.training else 0
            call.times = max(0, growth)
            call.updates = call.times > 0
        self._counts.update(unseen)

    def _follow_replaced(self) -> None:
        """Go on with the layers that have replaced watched ones, as `convert_sync_batchnorm` does."""
        for index, watched in enumerate(self.layers):
            layer = None if watched.is_called else _at_path(self._inner, watched.evidence.name)
            if isinstance(layer, _BatchNorm) and layer is not watched.layer:
                self.read()
                self._handles.append(watched.watch_instead(layer))
                self._modules[index] = layer
                self._not_finite.discard(index)
                self._kept_out[index] = 0
                self._counts[index] = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        """Close a step of the layers that an optimizer trains."""
        self._follow_replaced()
        is_known = self._owners.knows(optimizer)
        if not self._owners.trains_model(optimizer):
            for watched in self.layers:
                watched.see_other_step()
            return
        has_run = any(watched.has_run for watched in self.layers)
        if not is_known and self.latest is not None:
            self._take_up(optimizer, self.latest, has_run)
        is_counted = self.latest is None or optimizer is self.latest
        if not is_counted and not has_run:
            return  # several optimizers step together
        if is_counted:
            self.step += 1
            self.latest = optimizer
        self._close(optimizer, skipped, has_run)
        self.passes.next_step()
        if self.step % min(self._every, _LONGEST_WAIT) == 0:
            self.read()
        self._on_step()

    def _take_up(self, optimizer: Optimizer, earlier: Optimizer, has_run: bool) -> None:
        """Take up an optimizer that steps for the first time: a successor, or one that steps in turn with another."""
        if self._owners.succeeds(optimizer, earlier):
            self.latest = optimizer
            return
        for watched in self.layers if has_run else ():
            if self._owners.trains_layer(optimizer, watched.layer):
                watched.begin_again()

    def _close(self, optimizer: Optimizer, skipped: bool | Tensor, has_run: bool) -> None:
        if has_run:
            self._stop_counting()
        else:
            self._end_pass(self.passes.unseen())
        trained_by = self._owners.trained_by(optimizer)
        steps = []
        for watched in self.layers:
            steps.append(watched.taken)
            if self._owners.trains_layer(optimizer, watched.layer):
                self._close_layer(watched, skipped, trained_by)
            else:
                watched.see_other_step()
        self._buffers.not_finite(partial(self._take_not_finite, steps))
        self._buffers.kept_out(partial(self._take_kept_out, steps))
        if self.step % self._every == 1 % self._every:
            self._ranks.send(self.step, self._reading)

    def _close_layer(self, watched: WatchedLayer, skipped: bool | Tensor, trained_by: frozenset[int] | None) -> None:
        name, layer = watched.evidence.name, watched.layer
        is_frozen = not layer.training and why_frozen(self._inner, name) is not None
        calls = watched.take(keeps=not self._owners.has_owner(layer))
        watched.is_sampled = is_sampled(watched.taken, self._every)
        close = partial(watched.close, calls, trained_by=trained_by, is_frozen=is_frozen)
        if not isinstance(skipped, Tensor) and self._closing.is_empty:
            close(skipped=skipped)
        else:
            unknown = [skipped] if isinstance(skipped, Tensor) else []
            self._closing.add(unknown, lambda known: close(skipped=bool(known[0] if known else skipped)))

    def _take_sample(self, watched: WatchedLayer, x: Tensor) -> None:
        def use(sample: Sample) -> None:
            watched.evidence.samples.append(sample)  # type: ignore[attr-defined] # a list here
            self._on_sample(watched, sample)

        self._samplers[self.layers.index(watched)].add(
            watched.taken, watched.layer, x, use, is_fresh=watched.evidence.is_fresh
        )

    def _take_not_finite(self, steps: list[int], counts: dict[int, float]) -> None:
        for index, count in counts.items():
            evidence = self.layers[index].evidence
            if count and index not in self._not_finite and evidence.nonfinite_step is None:
                evidence.nonfinite_step = steps[index]

    def _take_kept_out(self, steps: list[int], counts: dict[int, float]) -> None:
        for index, count in counts.items():
            more = int(count - self._kept_out.get(index, 0))
            self._kept_out[index] = count
            self.layers[index].keep_out(more, steps[index])

    def _take_spread(self, index: int, spread: RankSpread) -> None:
        self.layers[index].evidence.ranks = spread

    def _noise_of(self, index: int) -> tuple[float, float] | None:
        samples = self.layers[index].evidence.samples
        return (samples[-1].noise, samples[-1].log_noise) if samples else None


def _at_path(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a part of the model is gone
        return None


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module runs as compiled code, in which the hooks of its parts are not called."""
    return is_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None
