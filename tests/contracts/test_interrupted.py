"""An action that raises or is interrupted, at whatever moment, leaves the model and the process as they were."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from tests.interrupts import Moments
from tests.traces import differences, trace_of, trace_of_process
from torch import nn

import bnlab
from bnlab.errors import BnlabError

BATCHES = [
    (torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) + 1, torch.arange(8) % 2) for seed in range(3)
]
"""Batches on the CPU, where loaders make them."""
INPUTS = [x for x, _ in BATCHES]


def network(first, device):
    torch.manual_seed(0)
    model = nn.Sequential(
        first,
        nn.Linear(3, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4, momentum=0.9),
    )
    model.add_module("head", nn.Linear(4, 2))
    model.to(device)
    model[2].num_batches_tracked.fill_(900)
    model[2].running_mean.copy_(torch.tensor([-0.0, 9.0, 0.0, 1.0, -3.0, 2.0]))
    model[6].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model[2].register_forward_hook(lambda *_: None)
    return model


ACTIONS = {
    "check": lambda model: bnlab.check(model, data=BATCHES, train_data=BATCHES, metric="accuracy"),
    "repair": lambda model: bnlab.repair(
        model, data=BATCHES, train_data=BATCHES, safety="behaviour", level="info", force=True
    ),
    "recalibrate": lambda model: bnlab.recalibrate(model, INPUTS),
    "recalibrate, layerwise": lambda model: bnlab.recalibrate(model, INPUTS, layerwise=True),
    "fold": lambda model: bnlab.fold(model, INPUTS[0]),
    "convert, fuse": lambda model: bnlab.convert(model, bnlab.nn.BatchNorm1d, fuse=True, example=INPUTS[0]),
}
IN_PLACE = {
    **{name: action for name, action in ACTIONS.items() if name not in ("check", "fold")},
    "convert": lambda model: bnlab.convert(model, nn.GroupNorm),
    "freeze": lambda model: bnlab.freeze(model),
    "unfreeze": lambda model: bnlab.unfreeze(model),
}
"""The actions that change a model, and return a receipt."""

EVERY = "BNLAB_EVERY_CALL" in os.environ
"""Whether to raise at every call of forward and at more moments; it takes some minutes."""


class Stop(RuntimeError):
    pass


class Counted(nn.Module):
    """A module that raises at one of its calls, or only counts them."""

    def __init__(self, error=None, at=-1):
        super().__init__()
        self.error, self.at = error, at
        Counted.calls = 0

    def forward(self, x):
        Counted.calls += 1
        if Counted.calls == self.at:
            raise self.error
        return x


@pytest.mark.parametrize("action", ACTIONS)
def test_an_error_at_any_call_of_forward_changes_nothing(action, device):
    model = network(Counted(), device)
    before = trace_of(model)
    ACTIONS[action](model)
    calls = Counted.calls
    assert calls > 2
    is_in_place = action not in ("check", "fold")
    assert bool(differences(before, trace_of(model))) == is_in_place  # the test would see a change
    step = 1 if EVERY else 1 + 2 * (calls // 50)
    changed = {}
    for at in range(1, calls + 1, step):
        error = Stop("forward stops") if at % 2 else KeyboardInterrupt()
        model = network(Counted(error, at), device)
        before, process = trace_of(model), trace_of_process()
        try:
            ACTIONS[action](model)
        except (Stop, KeyboardInterrupt, BnlabError):
            changed[at] = differences(before, trace_of(model))
        changed[at] = changed.get(at, []) + differences(process, trace_of_process())
    assert not {at: names for at, names in changed.items() if names}


@pytest.fixture
def interrupting():
    """Sends SIGALRM, in the command alone, to a handler that raises as that of Ctrl-C does, until the test ends."""

    def interrupt(_, frame):
        if is_in_a_command(frame):
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


def is_in_a_command(frame):
    """Return whether a call is one of bnlab, or comes from it: a timer may fire when the command has returned."""
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("bnlab."):
        frame = frame.f_back
    return frame is not None


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_at_any_moment_changes_nothing(action, device):
    """Timers interrupt at random instructions."""
    ACTIONS[action](network(Counted(), device))  # what it imports is imported once
    start = time.perf_counter()
    ACTIONS[action](network(Counted(), device))
    duration = time.perf_counter() - start
    random_times = random.Random(action)
    changed, interrupted = {}, 0
    for attempt in range(200 if EVERY else 4):
        model = network(Counted(), device)
        before, process = trace_of(model), trace_of_process()
        moment = max(random_times.random() * duration, 1e-6)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, moment)
                ACTIONS[action](model)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (KeyboardInterrupt, BnlabError):
            interrupted += 1
            changed[attempt, moment] = differences(before, trace_of(model)) + differences(process, trace_of_process())
    assert not {when: names for when, names in changed.items() if names}
    assert interrupted or not EVERY


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize("action", IN_PLACE)
def test_an_interrupt_behind_the_change_changes_nothing(action, device):
    """The receipt has not reached the caller then."""

    def network_to_change():
        model = network(Counted(), device)
        if action == "unfreeze":
            bnlab.freeze(model)
        return model

    moments = Moments(IN_PLACE[action], network_to_change)
    changed = {}
    for at in range(1, moments.count + 1, 1 if EVERY else moments.count - 1):
        model = network_to_change()
        before, process = trace_of(model), trace_of_process()
        with pytest.raises(KeyboardInterrupt):
            moments.interrupt(model, at)
        changed[at] = differences(before, trace_of(model)) + differences(process, trace_of_process())
    assert not {at: names for at, names in changed.items() if names}
