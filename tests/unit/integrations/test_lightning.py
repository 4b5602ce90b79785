"""With stand-ins for Lightning; tests/integration/test_loop_of_lightning.py has the real one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.unit.integrations.frameworks import stand_in
from tests.unit.integrations.networks import batches, first_statistics, is_equal, network, state
from tests.unit.integrations.test_training_callback import train
from torch.optim.swa_utils import AveragedModel

import bnlab
from bnlab.errors import MissingPackage


class Callback:
    pass


class Checkpoint(Callback):
    pass


class Logger:
    def __init__(self, experiment=None):
        self.calls, self.experiment = [], experiment

    def log_metrics(self, metrics, step):
        self.calls.append((step, metrics))


@pytest.fixture
def make():
    with stand_in("lightning", {"lightning.pytorch": {"Callback": Callback}}) as module:
        yield module.BnlabCallback


def trainer_with(callbacks, model, **options):
    precision = SimpleNamespace(scaler=None, forward_context=nullcontext, convert_input=lambda batch: batch)
    return SimpleNamespace(**{
        "callbacks": [*callbacks], "precision_plugin": precision, "loggers": [Logger()], "global_step": 7,
        "optimizers": [torch.optim.SGD(model.parameters(), lr=0.01)], "fit_loop": SimpleNamespace(),
        "state": SimpleNamespace(fn="fit"), "sanity_checking": False, "train_dataloader": batches(), **options,
    })  # fmt: skip


def run(callback, trainer, model, steps=3):
    callback.on_train_start(trainer, model)
    for batch in batches()[:steps]:
        callback.on_train_batch_start(trainer, model, batch, 0)
        model.train()(batch).square().mean().backward()
        trainer.optimizers[0].step()
        trainer.optimizers[0].zero_grad()


def test_a_callback_is_one_of_every_package_that_is_in_use():
    class Other:
        pass

    packages = {"lightning.pytorch": {"Callback": Callback}, "pytorch_lightning": {"Callback": Other}}
    with stand_in("lightning", packages) as module:
        assert issubclass(module.BnlabCallback, Callback)
        assert issubclass(module.BnlabCallback, Other)


def test_without_lightning_the_error_says_what_to_install():
    with (
        pytest.raises(MissingPackage, match="pip install lightning"),
        stand_in("lightning", {"lightning.pytorch": None, "pytorch_lightning": None}),
    ):
        pytest.fail("the import must end in an error")


def test_its_place_is_behind_other_callbacks_and_before_those_that_save(make):
    callback, saving, other = make(), Checkpoint(), Callback()
    trainer = SimpleNamespace(callbacks=[saving, callback, other])
    callback.setup(trainer, None, "fit")
    assert trainer.callbacks == [other, callback, saving]


def test_values_go_to_all_loggers_at_the_steps_of_the_trainer(make):
    model, callback = network(), make(every=2)
    trainer = trainer_with([callback], model, loggers=[Logger(), Logger()])
    run(callback, trainer, model, steps=4)
    callback.on_train_end(trainer, model)
    assert callback.events == ()
    first, second = trainer.loggers
    assert first.calls == second.calls
    assert {step for step, _ in first.calls} == {7}
    assert any("bnlab/1/lag" in metrics for _, metrics in first.calls)


@pytest.mark.parametrize(
    ("options", "happens"),
    [({}, True), ({"sanity_checking": True}, False), ({"state": SimpleNamespace(fn="validate")}, False)],
)
def test_statistics_are_those_of_the_data_during_validation(make, options, happens):
    model, callback = network(), make(recalibrate_before="validation")
    trainer = trainer_with([callback], model)
    run(callback, trainer, model)
    vars(trainer).update(options)
    before = state(model)
    callback.on_validation_start(trainer, model)
    mean, _ = first_statistics(model, batches())
    assert torch.allclose(model[1].running_mean, mean, atol=1e-4) == happens
    callback.on_validation_end(trainer, model)
    assert is_equal(state(model), before)


@pytest.mark.parametrize("averages", [False, True])
def test_a_checkpoint_has_the_statistics_of_its_weights_and_those_of_the_training(make, averages):
    model, callback = network(), make(recalibrate_before="save")
    averaging = Callback()
    averaging._average_model = AveragedModel(model, use_buffers=True)
    trainer = trainer_with([callback, averaging] if averages else [callback], model)
    run(callback, trainer, model)
    saved = averaging._average_model.module if averages else model
    averaging._average_model.update_parameters(model)
    with torch.no_grad():
        model[0].weight.mul_(2)  # the average has other weights
    before, checkpoint = state(saved), {"state_dict": dict(saved.state_dict())}
    callback.on_save_checkpoint(trainer, model, checkpoint)
    assert is_equal(state(saved), before)
    mean, var = first_statistics(saved, batches())
    torch.testing.assert_close(checkpoint["state_dict"]["1.running_mean"], mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(checkpoint["state_dict"]["1.running_var"], var, rtol=1e-4, atol=1e-4)
    assert checkpoint["state_dict"]["1.num_batches_tracked"] == 44
    assert torch.equal(checkpoint["state_dict"]["0.weight"], before["0.weight"])

    saved.load_state_dict(checkpoint["state_dict"])  # as a fit that resumes does
    callback.on_load_checkpoint(trainer, model, checkpoint)
    assert is_equal(state(saved), before)


def test_a_checkpoint_is_left_alone_without_the_option(make):
    model, callback = network(), make()
    trainer = trainer_with([callback], model)
    checkpoint = {"state_dict": dict(model.state_dict())}
    callback.on_save_checkpoint(trainer, model, checkpoint)
    assert checkpoint.keys() == {"state_dict"}
    callback.on_load_checkpoint(trainer, model, checkpoint)


def test_events_reach_loggers_of_texts_too(make):
    class Writer:
        def __init__(self):
            self.texts = []

        def add_scalar(self, tag, value, step):
            raise AssertionError("the logger writes numbers")

        def add_text(self, tag, text, step):
            self.texts.append((tag, text, step))

    model, callback, writer = network(), make(), Writer()
    trainer = trainer_with([callback], model, loggers=[Logger(writer)])
    run(callback, trainer, model)
    with torch.no_grad():
        model(batches()[0])
    with pytest.warns(bnlab.errors.BnlabWarning, match="BN606"):
        train(model, 2, trainer.optimizers[0])
    callback.on_exception(trainer, model, ValueError())
    assert [tag for tag, _, _ in writer.texts] == ["bnlab/events/BN606"] * 2
    assert writer.texts[0][1].startswith("BN606 MovedOutsideTraining, 1: ")
    assert (7, {"bnlab/events/BN606": 2.0}) in trainer.loggers[0].calls


def test_the_passes_of_stochastic_weight_averaging_are_expected(make):
    model, callback = network(), make()
    trainer = trainer_with([callback], model)
    run(callback, trainer, model)
    trainer.fit_loop._skip_backward = True
    for batch in batches():
        callback.on_train_batch_start(trainer, model, batch, 0)
        model(batch)
    callback.on_train_epoch_end(trainer, model)
    callback.on_train_end(trainer, model)
    assert callback.events == ()
