import pytest
from torch import nn

from bnlab.errors import UsageError
from bnlab.remedies.undo import UndoStack


def test_changes_are_taken_back_in_the_reverse_order():
    order, layer = [], nn.BatchNorm1d(2)
    undo = UndoStack()
    undo.push(layer, lambda: order.append("first"))
    undo.push(layer, lambda: order.append("second"))
    undo.seal()
    assert order == []
    undo.take_back()
    assert order == ["second", "first"]


def test_a_stack_whose_changes_were_restored_is_taken_back_again():
    order, layer, interrupts = [], nn.BatchNorm1d(2), [KeyboardInterrupt()]

    def interrupted():
        order.append("first")
        if interrupts:
            raise interrupts.pop()

    undo = UndoStack()
    undo.push(layer, interrupted)
    undo.push(layer, lambda: order.append("second"))
    undo.seal()
    with pytest.raises(KeyboardInterrupt):
        undo.take_back()
    undo.take_back()
    assert order == ["second", "first", "second", "first"]


@pytest.mark.parametrize("later", [{"activation": "relu"}, {"takes_residual": True}, {"frozen_from": object()}])
def test_what_was_built_upon_is_not_taken_back(later):
    layer, order = nn.BatchNorm1d(2), []
    undo = UndoStack()
    undo.push(layer, lambda: order.append("back"))
    undo.seal()
    vars(layer).update(later)
    with pytest.raises(UsageError, match="every module must be unchanged, got a BatchNorm1d that was changed"):
        undo.take_back()
    assert order == []
