import threading

import pytest
import torch
from tests.traces import differences, trace_of, trace_of_process
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.observe.passes.in_use import belongs_to_another_command, in_use, one_at_a_time, runs_command


def in_a_thread(function):
    """Return what a function returns or raises in another thread."""
    outcome = []

    def work():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return outcome[0]


@one_at_a_time("look")
def look(model, *, other=None):
    """Look."""
    return in_a_thread(lambda: belongs_to_another_command(threading.get_ident())) if other is None else other()


def test_a_second_thread_is_refused_in_one_line_and_a_second_call_is_not():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with in_use(model, "recalibrate"):
        error = in_a_thread(lambda: look(model))
        assert isinstance(error, UsageError)
        assert str(error) == (
            "look: model must be used by one command at a time, got one that recalibrate uses in another thread. "
            "Wait for it to end, or pass a copy: copy.deepcopy(model)."
        )
        assert look(model) is False  # the same thread may
    assert in_a_thread(lambda: look(model)) is False


def test_a_part_of_a_model_is_the_model_too_and_another_model_is_free():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)))
    with in_use(model, "check"):
        assert isinstance(in_a_thread(lambda: look(model[0])), UsageError)
        assert isinstance(in_a_thread(lambda: look(model=nn.Sequential(model[0]))), UsageError)
        assert in_a_thread(lambda: look(nn.Sequential(nn.BatchNorm1d(3)))) is False


def test_a_model_is_free_again_behind_an_error():
    model = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError):
        look(model, other=lambda: 1 / 0)
    assert in_a_thread(lambda: look(model)) is False


def test_the_signature_and_the_docstring_are_those_of_the_function():
    assert look.__doc__ == "Look."
    assert bnlab.recalibrate.__wrapped__.__name__ == "recalibrate"


def test_other_arguments_than_models_pass():
    assert look("path.pt") is False


def test_two_threads_on_one_model_leave_it_as_it_was_and_on_two_models_agree():
    """One thread stops in its forward until the other was refused; then each checks a model of its own."""
    torch.manual_seed(0)
    batches = [torch.randn(8, 3) for _ in range(4)]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inside, go_on = threading.Event(), threading.Event()

    def forward(model, batch):
        inside.set()
        assert go_on.wait(60)
        return model(batch)

    before, process = trace_of(model), trace_of_process()
    errors = []
    checking = threading.Thread(target=lambda: errors.append(bnlab.check(model, data=batches, forward=forward).failure))
    checking.start()
    assert inside.wait(60)
    with pytest.raises(UsageError, match="recalibrate: model must be used by one command at a time"):
        bnlab.recalibrate(model, batches)
    alone = bnlab.check(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), data=batches)
    assert alone.failure is None
    go_on.set()
    checking.join()
    assert errors == [None]
    assert differences(before, trace_of(model)) == []
    assert [name for name in differences(process, trace_of_process()) if "random" not in name] == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_thread_knows_whether_it_runs_a_command():
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert not runs_command()
    with in_use(model, "recalibrate"):
        assert runs_command()
        assert not in_a_thread(runs_command)
