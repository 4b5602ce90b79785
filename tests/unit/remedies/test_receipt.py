import signal

import pytest
from tests.interrupts import Moments
from torch import nn

import bnlab
from bnlab.records import Change, Changes, Safety
from bnlab.remedies.receipt import Receipt

CHANGES = Changes(
    bnlab="0", action="set-momentum", safety=Safety.BEHAVIOUR, changes=(Change("bn", "momentum", "0.9", "0.1"),)
)


def test_undo_works_once_and_gives_the_model():
    model, calls = nn.BatchNorm1d(2), []
    receipt = Receipt(model, CHANGES, lambda: calls.append("undone"))
    assert receipt.undo() is model
    assert receipt.undo() is model
    assert calls == ["undone"]


def test_an_undo_that_is_refused_can_be_tried_again():
    answers = [ValueError("not yet"), None]

    def undo():
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    receipt = Receipt(nn.BatchNorm1d(2), CHANGES, undo)
    try:
        receipt.undo()
    except ValueError:
        receipt.undo()
    assert answers == []


def test_an_undo_of_several_receipts_that_is_interrupted_can_be_repeated():
    model, interrupts = nn.BatchNorm1d(2, eps=3.0, momentum=0.3), [KeyboardInterrupt()]

    def restore_momentum():
        model.momentum = 0.1
        if interrupts:
            raise interrupts.pop()

    receipts = [
        Receipt(model, CHANGES, restore_momentum),
        Receipt(model, CHANGES, lambda: setattr(model, "eps", 1.0)),
    ]
    both = Receipt(model, CHANGES, lambda: [receipt.undo() for receipt in reversed(receipts)])
    with pytest.raises(KeyboardInterrupt):
        both.undo()
    assert (model.eps, model.momentum) == (3.0, 0.3)
    both.undo()
    assert (model.eps, model.momentum) == (1.0, 0.1)


def test_an_interrupt_at_any_moment_behind_an_undo_takes_it_back_and_it_can_be_repeated(request):
    def interrupt(*_):
        raise KeyboardInterrupt

    def converted():
        return bnlab.convert(nn.Sequential(nn.BatchNorm1d(2)), bnlab.nn.BatchNorm1d)

    before = signal.signal(signal.SIGALRM, interrupt)
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
    moments = Moments(lambda receipt: receipt.undo(), converted)
    assert moments.count > 50
    for at in range(1, moments.count + 1):
        receipt = converted()
        with pytest.raises(KeyboardInterrupt):
            moments.interrupt(receipt, at)
        assert type(receipt.model[0]) is bnlab.nn.BatchNorm1d
        assert type(receipt.undo()[0]) is nn.BatchNorm1d


def test_it_prints_what_changed():
    receipt = Receipt(nn.BatchNorm1d(2), CHANGES, lambda: None)
    assert repr(receipt) == "<Receipt: set-momentum, layers changed: 1>"
    assert "momentum: 0.9 -> 0.1 (bn)" in str(receipt)
