"""With stand-ins for transformers; tests/integration/test_loop_of_transformers.py has the real one."""

from types import SimpleNamespace

import pytest
import torch
from tests.unit.integrations.frameworks import stand_in
from tests.unit.integrations.networks import batches, first_statistics, is_equal, network, state

from bnlab.errors import MissingPackage


class TrainerCallback:
    pass


class Reporter:
    def __init__(self, tb_writer="none"):
        self.logs = []
        if tb_writer != "none":
            self.tb_writer = tb_writer

    def on_log(self, args, state, control, logs, model):
        self.logs.append((state.global_step, logs))


@pytest.fixture
def make():
    modules = {
        "transformers.trainer_callback": {"TrainerCallback": TrainerCallback},
        "transformers.integrations.integration_utils": {"INTEGRATION_TO_CALLBACK": {"one": Reporter}},
    }
    with stand_in("transformers", modules) as module:
        yield module.BnlabCallback


class Handler:
    """Calls callbacks as that of transformers does."""

    def __init__(self, callback, model, *others):
        self.callbacks = [*others, callback]
        self.callback = callback
        self.args = SimpleNamespace(save_strategy=SimpleNamespace(value="steps"))
        self.state = SimpleNamespace(global_step=7)
        self.control = SimpleNamespace(should_evaluate=False, should_save=False)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.model = model

    def call(self, event):
        getattr(self.callback, event)(
            self.args, self.state, self.control, model=self.model, optimizer=self.optimizer, train_dataloader=batches()
        )

    def train(self, steps=3):
        for batch in batches()[:steps]:
            self.call("on_step_begin")
            self.model.train()(batch).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def recalibrated(model):
    return torch.allclose(model[1].running_mean, first_statistics(model, batches())[0], atol=1e-4)


def test_without_transformers_the_error_says_what_to_install():
    with (
        pytest.raises(MissingPackage, match="pip install transformers"),
        stand_in("transformers", {"transformers.trainer_callback": None}),
    ):
        pytest.fail("the import must end in an error")


@pytest.mark.parametrize("moments", ["validation", "save", ("validation", "save")], ids=str)
@pytest.mark.parametrize("best", [False, True])
def test_statistics_are_those_of_the_data_in_an_evaluation_and_in_a_checkpoint(make, moments, best):
    model = network()
    handler = Handler(make(recalibrate_before=moments), model)
    handler.call("on_train_begin")
    handler.call("on_epoch_begin")
    handler.train()
    before = state(model)
    handler.control = SimpleNamespace(should_evaluate=True, should_save=not best)
    if best:  # the Trainer decides after the evaluation
        handler.args.save_strategy.value = "best"
    handler.call("on_step_end")
    assert recalibrated(model) == ("validation" in moments)
    handler.call("on_evaluate")
    assert recalibrated(model) == ("save" in moments)
    handler.call("on_save" if not best else "on_step_begin")
    assert is_equal(state(model), before)
    handler.call("on_train_end")
    assert handler.callback.events == ()


def test_a_checkpoint_without_an_evaluation(make):
    model = network()
    handler = Handler(make(recalibrate_before="save"), model)
    handler.call("on_train_begin")
    handler.train()
    before = state(model)
    handler.control.should_save = True
    handler.call("on_epoch_end")
    assert recalibrated(model)
    handler.call("on_save")
    assert is_equal(state(model), before)


def test_an_evaluation_by_hand_is_left_alone(make):
    model = network()
    handler = Handler(make(recalibrate_before="save"), model)
    handler.call("on_train_begin")
    handler.call("on_train_end")
    before = state(model)
    handler.control.should_save = True
    handler.call("on_evaluate")
    assert is_equal(state(model), before)


def test_values_go_to_the_reporters_of_the_trainer(make):
    model, reporter, closed, other = network(), Reporter(), Reporter(None), SimpleNamespace()
    handler = Handler(make(every=2), model, reporter, closed, other)
    handler.call("on_train_begin")
    handler.train(4)
    handler.call("on_train_end")
    assert handler.callback.events == ()
    assert {step for step, _ in reporter.logs} == {7}
    assert any("bnlab/1/lag" in logs for _, logs in reporter.logs)
    assert closed.logs == []
