"""watch: observes the BN layers of a model while it trains, and reports mishaps as they happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from typing_extensions import Self

from bnlab.checks import RUN_CHECKS
from bnlab.errors import UsageError
from bnlab.observe.passes.kept_batches import is_count
from bnlab.observe.training_run import Sample, TrainingRun
from bnlab.watching.events import Event, event_of, warn
from bnlab.watching.logs import Log, LogTarget, log_of, value_key
from bnlab.watching.recorder import Recorder
from bnlab.watching.watched_layer import WatchedLayer

if TYPE_CHECKING:
    from bnlab.diagnosis.check import Diagnosis

__all__ = ["Watch", "watch"]


def watch(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
    every: int = 100,
    log: LogTarget = None,
) -> Watch:
    """Watch the BN layers of a model in any training loop.

    Use the watch as a context manager round the loop, or call `start()` and `stop()`. It observes the mode and the
    updates of every layer in each step, and statistics at two consecutive steps of every `every`. Each kind of mishap
    (BN601 to BN610, see `bnlab.explain`) is reported once for each layer: by a warning, and in `events`. The state
    dict, copies and pickles of the model are those of a model without a watch.

    Args:
        model: The model that the loop calls, with the wrappers round it: compiled, DDP or FSDP. Its layers are those of
            torch and of bnlab.
        optimizer: The optimizer that trains the model. None stands for every one that has parameters of the model.
        scaler: The gradient scaler of mixed precision, which may skip steps (BN609).
        every: Number of steps from one sample of the statistics to the next.
        log: Takes statistics and events: a function that takes a dict of numbers, a TensorBoard SummaryWriter, or the
            path of a file for JSON lines (docs/watch.md).

    Returns:
        The watch, which has not started yet.

    Raises:
        NoBatchNorm: If the model has no BN layer.
        UsageError: If an argument is invalid.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bnlab.watch(model, optimizer) as watch:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> watch.events
        ()
    """
    if not is_count(every):
        raise UsageError(f"watch: every must be a whole number >= 1, got {every!r}.")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise UsageError(f"watch: optimizer must be an optimizer of torch or None, got {type(optimizer).__name__}.")
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise UsageError(f"watch: scaler must be a GradScaler or None, got {type(scaler).__name__}.")
    return Watch(model, optimizer, scaler=scaler, every=every, log=log_of(log))


class Watch:
    """A watch over a training run. `bnlab.watch` makes it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        scaler: torch.amp.GradScaler | None,
        every: int,
        log: Log,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._log = log
        self._recorder = Recorder(
            model, optimizer, scaler=scaler, every=every, on_step=self._judge, on_sample=self._log_sample
        )
        self._events: list[Event] = []
        self._remaining = {check.code: [*self._recorder.layers] for check in RUN_CHECKS}
        self._values: dict[str, float] = {}
        self._is_running = self._has_ended = False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def step(self) -> int:
        """Number of optimizer steps so far. Where several optimizers step in turn, they are those of the first one."""
        return self._recorder.step

    @property
    def run(self) -> TrainingRun:
        """The evidence on the run so far."""
        return self._recorder.run

    @property
    def events(self) -> tuple[Event, ...]:
        """The events so far, in the order in which they were noticed. On a GPU this waits for the device."""
        if self._is_running:
            self._recorder.read()
            self._judge(stacklevel=3)
        return tuple(self._events)

    def start(self) -> Self:
        """Begin to watch. A watch can be used once.

        Raises:
            UsageError: If the watch has started before.
        """
        if self._is_running or self._has_ended:
            raise UsageError("watch: start must be called once for each watch. Make another one with bnlab.watch.")
        self._recorder.install()
        self._is_running = True
        return self

    def stop(self) -> None:
        """End the watch, and judge the forward passes that no step follows. A second call does nothing."""
        self._recorder.remove()
        if self._is_running:
            self._is_running, self._has_ended = False, True
            self._recorder.end()
            self._judge(stacklevel=3)

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Declare forward passes that may update statistics outside of training: they cause no event."""
        self._recorder.passes.expected += 1
        try:
            yield
        finally:
            self._recorder.passes.expected -= 1

    def report(self) -> Diagnosis:
        """Return a diagnosis of the model as it is now, with the events as findings and the history of statistics.

        The model does not run, so that checks of data are skipped. `bnlab.check` runs them.
        """
        from bnlab.watching.report import diagnosis_of

        events = self.events
        optimizer = self._optimizer if isinstance(self._optimizer, Optimizer) else self._recorder.latest
        return diagnosis_of(self._model, optimizer, self.run, events, self.step)

    def _judge(self, stacklevel: int = 6) -> None:
        """Run the checks on the layers that have no event of their kind so far."""
        new = []
        for check in RUN_CHECKS:
            layers = self._remaining[check.code]
            findings = [*check.inspect(TrainingRun(layers=tuple(watched.evidence for watched in layers)))]
            if findings:
                order = {watched.evidence.name: watched.order for watched in layers}
                findings.sort(key=lambda finding: order[finding.layer or ""])
                names = {finding.layer for finding in findings}
                self._remaining[check.code] = [one for one in layers if one.evidence.name not in names]
                new += [event_of(check, finding) for finding in findings]
        if self._values:
            values, self._values = self._values, {}
            self._log.values(self.step, values)
        self._events += new
        for event in new:
            self._log.event(event.step, event.code, event.name, event.layer, event.message)
        warn(new, stacklevel)

    def _log_sample(self, watched: WatchedLayer, sample: Sample) -> None:
        name = watched.evidence.name
        for key, value in (
            ("lag", sample.drift),
            ("running_mean", sample.running_mean),
            ("running_var", sample.running_var),
        ):
            self._values[value_key(name, key)] = value
