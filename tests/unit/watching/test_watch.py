import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import BnlabWarning, NoBatchNorm, UsageError
from bnlab.watching.watch import Watch


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 100, 4))


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 12, 12)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def training():
    model = network()
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def test_a_watch_that_sees_nothing_wrong_is_silent_and_changes_nothing(training):
    model, optimizer = training
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    keys = list(model.state_dict())
    torch.manual_seed(1)
    with bnlab.watch(model, optimizer, every=2) as watch:
        train(model, optimizer, steps=5)
    torch.manual_seed(1)
    train(twin, twin_optimizer, steps=5)
    assert watch.events == ()
    assert watch.step == 5
    assert list(model.state_dict()) == keys
    assert all(torch.equal(one, twin.state_dict()[name]) for name, one in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_an_event_is_a_warning_at_its_step_and_is_reported_once(training):
    model, optimizer = training
    with bnlab.watch(model, optimizer) as watch:
        train(model, optimizer, steps=3)
        model.eval()
        with pytest.warns(BnlabWarning, match="BN605 TrainedInEvalMode, step 3, 1: the optimizer steps") as issued:
            train(model, optimizer, steps=2)
    assert len(issued) == 1
    assert issued[0].filename == __file__
    ((code, layer, at),) = [(event.code, event.layer, event.step) for event in watch.events]
    assert (code, layer, at) == ("BN605", "1", 3)


def test_the_events_of_several_layers_at_one_step_are_one_warning():
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bnlab.watch(model, optimizer) as watch:
        for training in (True, False):
            model.train(training)
            if not training:
                warnings.simplefilter("always")
            with warnings.catch_warnings(record=True) as issued:
                model(torch.randn(32, 3)).square().sum().backward()
                optimizer.step()
    assert [str(one.message).partition(":")[0] for one in issued] == [
        "BN605 TrainedInEvalMode, step 1, 5 layers (0, 1, 2 and 2 more)"
    ]
    assert len(watch.events) == 5


def test_copies_and_pickles_of_a_watched_model_do_nothing(training):
    model, optimizer = training
    with bnlab.watch(model, optimizer) as watch:
        train(model, optimizer)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                other(torch.randn(4, 3, 12, 12))
        assert b"bnlab" not in pickle.dumps(model)
        train(model, optimizer)
    (layer,) = watch.run.layers
    assert [one.updates for one in layer.steps] == [1, 1]
    assert layer.windows_outside == 0


def test_hooks_are_removed_when_the_loop_raises(training):
    model, optimizer = training

    def loop():
        with bnlab.watch(model, optimizer):
            train(model, optimizer)
            raise RuntimeError("the loop")

    with pytest.raises(RuntimeError, match="the loop"):
        loop()
    assert all(not module._forward_hooks for module in model.modules())


def test_a_watch_is_used_once_and_stops_more_than_once(training):
    watch = bnlab.watch(*training)
    assert isinstance(watch, Watch)
    watch.start()
    with pytest.raises(UsageError, match="start must be called once"):
        watch.start()
    watch.stop()
    watch.stop()
    with pytest.raises(UsageError, match=r"Make another one with bnlab\.watch"):
        watch.start()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"every": True}, "every must be a whole number >= 1, got True"),
        ({"optimizer": "adam"}, "optimizer must be an optimizer of torch or None, got str"),
        ({"scaler": 1.0}, "scaler must be a GradScaler or None, got float"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, error):
    with pytest.raises(UsageError, match=error):
        bnlab.watch(network(), **arguments)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(NoBatchNorm):
        bnlab.watch(nn.Linear(3, 3))


def test_values_and_events_go_to_the_log(training):
    model, optimizer = training
    logged = []
    with bnlab.watch(model, optimizer, every=2, log=logged.append):
        train(model, optimizer, steps=4)
        model.eval()
        with pytest.warns(BnlabWarning):
            train(model, optimizer)
    keys = {key for values in logged for key in values}
    assert {"bnlab/1/lag", "bnlab/1/running_mean", "bnlab/1/running_var", "bnlab/events/BN605"} <= keys


def test_the_passes_of_commands_of_bnlab_are_expected(training):
    model, optimizer = training
    with bnlab.watch(model, optimizer) as watch:
        train(model, optimizer, steps=4)
        bnlab.recalibrate(model, [torch.randn(8, 3, 12, 12) for _ in range(3)])
        train(model, optimizer)
    assert watch.events == ()
    assert watch.run.layers[0].windows_outside == 0


def test_events_of_a_step_have_the_order_in_which_the_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.first(x))

    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(), bnlab.watch(model, optimizer) as watch:
        warnings.simplefilter("ignore", bnlab.errors.BnlabWarning)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 3)).square().sum().backward()
            optimizer.step()
            model.eval()
    assert [event.layer for event in watch.events] == ["first", "last"]
