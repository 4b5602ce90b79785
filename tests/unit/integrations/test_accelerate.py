from types import SimpleNamespace

import pytest
import torch
from tests.unit.integrations.networks import network
from tests.unit.integrations.test_training_callback import train

import bnlab


class Accelerator(SimpleNamespace):
    def log(self, *args, **keywords):  # the signature that a decorator of accelerate leaves
        self.calls.append((keywords["step"], *args))


def accelerator(*optimizers, scaler=None):
    return Accelerator(_optimizers=[*optimizers], scaler=scaler, calls=[])


def test_a_loop_is_watched_and_its_trackers_get_the_values():
    model, loop = network(), accelerator()
    with bnlab.integrations.accelerate.watch(loop, model, every=2) as watch:
        train(model, 5)
    assert watch.events == ()
    assert all(isinstance(step, int) and "bnlab/1/lag" in values for step, values in loop.calls)
    assert loop.calls


@pytest.mark.parametrize("log", [None, "function"])
def test_another_log_takes_the_place_of_the_trackers(log):
    model, loop, calls = network(), accelerator(), []
    with bnlab.integrations.accelerate.watch(loop, model, every=2, log=log and calls.append):
        train(model, 5)
    assert loop.calls == []
    assert bool(calls) == (log == "function")


def test_a_step_that_the_scaler_skips_is_seen():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with bnlab.integrations.accelerate.watch(accelerator(optimizer, scaler=scaler), model, log=None) as watch:
        step(model, optimizer, scaler, 1.0)
        with pytest.warns(bnlab.errors.BnlabWarning, match="BN609"):
            step(model, optimizer, scaler, float("inf"))
        step(model, optimizer, scaler, 1.0)
    assert {(event.code, event.step) for event in watch.events} == {("BN609", 1)}


def step(model, optimizer, scaler, factor):
    scaler.scale(model(torch.randn(32, 4)).square().mean() * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
