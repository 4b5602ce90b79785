import signal
import threading

import pytest
import torch
from tests.interrupts import Moments
from tests.traces import differences, trace_of, trace_of_process
from torch import nn

from bnlab.errors import BnlabWarning, UsageError
from bnlab.observe.passes.command import add_way_back
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.uninterrupted import restores


class Other(nn.BatchNorm1d):
    pass


@one_at_a_time("change")
def change(model):
    with all_or_nothing(model):
        change_everything(model)
    return "receipt"


def change_everything(model):
    model[0].running_mean.add_(1)
    model[0].__class__ = Other
    model[0].weight.grad = None
    model[0].bias.requires_grad_(False)
    model[0].frozen_from = "a new attribute"
    model[1] = nn.Identity()


@one_at_a_time("change two")
def change_two(models):
    for model in models:
        change(model)


@restores
def opened(model):
    """Put another layer in the place of one, with the same buffers, as programs are opened."""
    layer = model[0]
    model[0] = nn.BatchNorm1d(3)
    model[0].running_mean = layer.running_mean
    try:
        yield
    finally:
        model[0] = layer


@one_at_a_time("change the opened one")
def change_opened(model):
    with opened(model), all_or_nothing(model):
        model[0].running_mean.add_(1)
        model[1] = nn.Identity()
    return "receipt"


def network():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    model(model[0].running_mean.new_ones(4, 3)).sum().backward()
    return model


def networks():
    return nn.ModuleList([network(), network()])


@pytest.fixture
def on_alarm():
    """Sets the handler of SIGALRM until the test ends."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.signal(signal.SIGALRM, before)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "new"),
    [
        (lambda model: change(model), network),
        (lambda model: change_two(model), networks),
        (lambda model: change_opened(model), network),
    ],
    ids=["one", "two in one", "one in a context that puts modules in the place of others"],
)
def test_an_interrupt_at_any_moment_behind_the_change_takes_it_back(command, new, on_alarm):
    on_alarm(interrupt)
    moments = Moments(command, new)
    assert moments.count > 50
    left = {}
    for at in range(1, moments.count + 1):
        model = new()
        before, process = trace_of(model), trace_of_process()
        with pytest.raises(KeyboardInterrupt):
            moments.interrupt(model, at)
        left[at] = differences(before, trace_of(model)) + differences(process, trace_of_process())
    assert not {at: names for at, names in left.items() if names}
    model = new()
    before = trace_of(model)
    command(model)
    assert differences(before, trace_of(model))


def test_a_handler_that_does_not_raise_leaves_the_change(on_alarm):
    """A training job that is told to stop notes it, and goes on to its next checkpoint."""
    signals = []
    on_alarm(lambda number, _: signals.append(number))
    moments = Moments(lambda model: change(model), network)
    for at in range(1, moments.count + 1):
        model = network()
        assert moments.interrupt(model, at) == "receipt"
        assert type(model[0]) is Other
        assert signals == [signal.SIGALRM] * at


def test_an_error_behind_the_change_takes_it_back_and_a_return_does_not():
    @one_at_a_time("divide")
    def divide(model, number):
        change(model)
        return 1 / number

    model = network()
    before = trace_of(model)
    with pytest.raises(ZeroDivisionError):
        divide(model, 0)
    assert differences(before, trace_of(model)) == []
    assert divide(model, 1) == 1
    assert type(model[0]) is Other


def test_a_command_that_failed_within_another_one_leaves_the_rest_to_it():
    order = []

    @one_at_a_time("fail")
    def fail(model):
        with all_or_nothing(model):
            model[0].running_mean.add_(1)
        add_way_back(lambda: order.append("inner"))
        raise ZeroDivisionError

    @one_at_a_time("go on")
    def go_on(model, error):
        with all_or_nothing(model):
            model[0].running_mean.add_(2)
        add_way_back(lambda: order.append("outer"))
        with pytest.raises(ZeroDivisionError):
            fail(model)
        if error:
            raise error

    model = network()
    start = model[0].running_mean.clone()
    go_on(model, None)
    assert model[0].running_mean.tolist() == (start + 2).tolist()
    assert order == ["inner"]
    with pytest.raises(OSError, match="the end"):
        go_on(model, OSError("the end"))
    assert model[0].running_mean.tolist() == (start + 2).tolist()
    assert order == ["inner", "inner", "outer"]


def test_a_block_within_another_one_keeps_no_values_of_its_own(monkeypatch):
    kept = []
    monkeypatch.setattr("bnlab.observe.passes.command.add_way_back", kept.append)
    model = network()
    with all_or_nothing(model):
        with all_or_nothing(model):
            model[0].running_mean.add_(1)
        with pytest.raises(ZeroDivisionError), all_or_nothing(model):
            raise ZeroDivisionError
        assert kept == []
    assert len(kept) == 1


def test_a_change_is_taken_back_before_another_thread_may_use_the_model():
    model, errors = network(), []

    def use():
        try:
            change(model)
        except UsageError as error:
            errors.append(str(error))

    @one_at_a_time("fail")
    def fail(_):
        add_way_back(use_in_a_thread)
        raise ZeroDivisionError

    def use_in_a_thread():
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    with pytest.raises(ZeroDivisionError):
        fail(model)
    assert len(errors) == 1
    assert "got one that fail uses in another thread" in errors[0]


def test_the_settings_of_torch_are_restored_when_a_command_raises():
    """An interrupt may come when `torch.no_grad` has changed the mode and its block has not begun."""

    @one_at_a_time("fail")
    def fail(_):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    before = trace_of_process()
    with torch.enable_grad():
        for argument in (network(), "path.pt"):
            with pytest.raises(KeyboardInterrupt):
                fail(argument)
            assert torch.is_grad_enabled()
    assert differences(before, trace_of_process()) == []


def test_each_thread_has_its_commands():
    ways_back = []

    @one_at_a_time("wait")
    def wait(model):
        thread = threading.Thread(target=lambda: add_way_back(lambda: ways_back.append("thread")))
        thread.start()
        thread.join()
        add_way_back(lambda: ways_back.append("main"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wait(network())
    assert ways_back == ["main"]


def test_a_way_back_that_fails_does_not_take_the_place_of_the_interrupt_or_stop_the_others():
    order = []

    @one_at_a_time("fail")
    def fail(_):
        add_way_back(lambda: order.append("first"))
        add_way_back(lambda: 1 / 0)
        raise KeyboardInterrupt

    with (
        pytest.warns(BnlabWarning, match="could not be restored whole: ZeroDivisionError"),
        pytest.raises(KeyboardInterrupt),
    ):
        fail(network())
    assert order == ["first"]
