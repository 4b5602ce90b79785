import pytest
import torch
from tests.unit.integrations.networks import batches, is_equal, network, state
from torch import nn
from torch.utils.data import DataLoader

from bnlab.errors import BnlabWarning, NoBatchNorm, UsageError
from bnlab.integrations.recalibration import Target
from bnlab.integrations.training_callback import TrainingCallback, one_or_none, scaler_in_use


def train(model, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    for index in range(steps):
        model(batches()[index % 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Log:
    def __init__(self):
        self.steps, self.events = [], []

    def values(self, step, values):
        self.steps.append(step)

    def event(self, step, code, name, layer, message):
        self.events.append((code, layer))


def test_a_training_is_watched_and_logged_to_the_framework():
    model, callback, log = network(), TrainingCallback(every=2), Log()
    callback.start_watch(model, None, None, log)
    assert callback.is_training
    train(model, 5)
    callback.stop_watch()
    assert not callback.is_training
    assert callback.events == ()
    assert log.steps
    assert callback.report().layers


@pytest.mark.parametrize("log", [None, "file"])
def test_another_log_takes_the_place_of_that_of_the_framework(log, tmp_path):
    path = tmp_path / "run.jsonl"
    model, framework = network(), Log()
    callback = TrainingCallback(every=2, log=log and path)
    callback.start_watch(model, None, None, framework)
    train(model, 5)
    callback.stop_watch()
    assert framework.steps == []
    assert path.exists() == (log == "file")


def test_events_are_those_of_the_latest_training():
    model, callback, log = network(), TrainingCallback(), Log()
    assert callback.events == ()
    with pytest.raises(UsageError, match=r"^BnlabCallback: report must follow a training"):
        callback.report()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    callback.start_watch(model, None, None, log)
    train(model, 2, optimizer)
    model.eval()
    with pytest.warns(BnlabWarning, match="BN605"):
        train(model, 2, optimizer)
    callback.stop_watch()
    assert ("BN605", "1") in log.events
    assert {(event.code, event.layer) for event in callback.events} == {("BN605", "1"), ("BN605", "4")}
    callback.start_watch(model.train(), None, None, None)
    callback.stop_watch()
    assert callback.events == ()


@pytest.mark.parametrize("is_expected", [False, True])
def test_expected_passes_are_no_event(is_expected):
    model, callback = network(), TrainingCallback()
    callback.start_watch(model, None, None, None)
    train(model)
    if is_expected:
        callback.expect_passes()
        callback.expect_passes()
    with torch.no_grad():
        model(batches()[0])
    callback.expect_no_passes()
    if is_expected:
        train(model)
        callback.stop_watch()
    else:
        with pytest.warns(BnlabWarning, match="BN606"):
            train(model)
        callback.stop_watch()
    assert bool(callback.events) != is_expected


def test_a_recalibration_is_no_event_and_ends_with_the_training():
    model, callback = network(), TrainingCallback(recalibrate_before="validation")
    callback.start_watch(model, None, None, None)
    train(model)
    before = state(model)
    assert callback.begin_recalibration(Target(model, batches()))
    assert not is_equal(state(model), before)
    callback.stop_watch()
    assert is_equal(state(model), before)
    assert callback.events == ()


def test_the_first_recalibration_must_be_possible_and_a_later_one_warns():
    model, callback = network(), TrainingCallback()
    wrong = Target(model, [torch.full((8, 4), torch.nan)])
    with pytest.raises(UsageError):
        callback.begin_recalibration(wrong)
    assert callback.begin_recalibration(Target(model, batches()))
    callback.end_recalibration()
    before = state(model)
    with pytest.warns(BnlabWarning, match=r"^BnlabCallback: model must allow a recalibration, got an error"):
        assert not callback.begin_recalibration(wrong)
    assert is_equal(state(model), before)


def test_data_are_those_of_the_options_or_of_the_framework():
    data = batches()
    assert TrainingCallback().data_or(data) is data
    assert TrainingCallback(batches=data).data_or({"a": 1}) is data
    loader = DataLoader(data)
    assert TrainingCallback().data_or(loader) is loader
    for loaders, got in ((None, "none"), ({"a": loader}, "several loaders"), ([loader, loader], "several loaders")):
        with pytest.raises(UsageError, match=f"^BnlabCallback: batches must be known .* got {got}[.] Pass batches="):
            TrainingCallback().data_or(loaders)


def test_moments():
    callback = TrainingCallback(recalibrate_before="save")
    assert callback.recalibrates_before("save")
    assert not callback.recalibrates_before("validation")


def test_a_model_without_bn_is_refused():
    with pytest.raises(NoBatchNorm):
        TrainingCallback().start_watch(nn.Linear(2, 2), None, None, None)


def test_a_scaler_in_use_may_skip_steps():
    scaler = torch.amp.GradScaler("cpu")
    assert scaler_in_use(scaler) is scaler
    assert scaler_in_use(torch.amp.GradScaler("cpu", enabled=False)) is None
    assert scaler_in_use(None) is None


def test_the_only_optimizer():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    assert one_or_none([optimizer]) is optimizer
    assert one_or_none([optimizer, optimizer]) is None
    assert one_or_none([]) is None
    assert one_or_none([object()]) is None
