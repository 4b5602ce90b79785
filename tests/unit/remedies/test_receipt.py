from torch import nn

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


def test_it_prints_what_changed():
    receipt = Receipt(nn.BatchNorm1d(2), CHANGES, lambda: None)
    assert repr(receipt) == "<Receipt: set-momentum, layers changed: 1>"
    assert "momentum: 0.9 -> 0.1 (bn)" in str(receipt)
