"""A watch in a real loop of accelerate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="make test-integration installs accelerate", exc_type=ImportError)

from tests.integration.networks import network  # noqa: E402
from tests.integration.recorded import scalars  # noqa: E402

import bnlab  # noqa: E402
from bnlab.errors import BnlabWarning  # noqa: E402


@pytest.fixture(autouse=True)
def without_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(scaler=None, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    accelerator.scaler = scaler  # accelerate makes none on a CPU
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 + 3
    loader = DataLoader(TensorDataset(values, torch.arange(64) % 10), batch_size=16, shuffle=True)
    return (accelerator, *accelerator.prepare(model, optimizer, loader))


def train(accelerator, model, optimizer, loader, validate=lambda step: None, factor=lambda step: 1.0, epochs=2):
    torch.manual_seed(3)
    step = 0
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y) * factor(step))
                optimizer.step()
                optimizer.zero_grad()
            validate(step)
            step += 1


def test_a_healthy_loop_is_silent_and_goes_on_as_without_the_recalibrations(tmp_path):
    states = []
    for recalibrates in (False, True):
        accelerator, model, optimizer, loader = prepared(log_with="tensorboard", project_dir=tmp_path)
        accelerator.init_trackers("run")

        def validate(step, recalibrates=recalibrates, model=model, optimizer=optimizer, loader=loader):
            if recalibrates and step % 3 == 0:  # in the middle of an epoch, from the loader that trains
                with bnlab.integrations.recalibrated(model, loader, optimizer=optimizer, max_batches=2):
                    assert model[1].num_batches_tracked == 44
                    model.eval()(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
                model.train()

        with bnlab.integrations.accelerate.watch(accelerator, model, optimizer, every=2) as watch:
            train(accelerator, model, optimizer, loader, validate)
        accelerator.end_training()
        assert watch.events == ()
        assert watch.step == 8
        states.append(model.state_dict())
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    written = scalars(tmp_path)
    assert {"bnlab/1/lag", "bnlab/4.bn1/running_mean"} <= written.keys()
    assert written["bnlab/1/lag"][0][0] >= 1


def test_a_validation_that_leaves_eval_mode_on_is_seen():
    accelerator, model, optimizer, loader = prepared()
    with (
        pytest.warns(BnlabWarning, match="BN605"),
        bnlab.integrations.accelerate.watch(accelerator, model) as watch,
    ):
        train(accelerator, model, optimizer, loader, lambda step: model.eval() if step == 1 else None)
    assert {(event.code, event.step) for event in watch.events} == {("BN605", 2)}
    assert len(watch.events) == 5


def test_a_step_that_the_scaler_skips_is_seen():
    accelerator, model, optimizer, loader = prepared(torch.amp.GradScaler("cpu", init_scale=1.0))
    with (
        pytest.warns(BnlabWarning, match="BN609"),
        bnlab.integrations.accelerate.watch(accelerator, model, optimizer) as watch,
    ):
        train(accelerator, model, optimizer, loader, factor=lambda step: float("inf") if step == 2 else 1.0, epochs=1)
    assert {(event.code, event.step) for event in watch.events} == {("BN609", 2)}


def test_once_per_step_with_accumulation_is_silent():
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=2)
    with (
        bnlab.once_per_step(model, optimizer.optimizer),
        bnlab.integrations.accelerate.watch(accelerator, model, optimizer) as watch,
    ):
        train(accelerator, model, optimizer, loader)
    assert watch.events == ()
