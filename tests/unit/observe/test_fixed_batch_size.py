import pytest
import torch

from bnlab.errors import UsageError
from bnlab.observe.fixed_batch_size import BatchesOfSize, inputs_of_size
from bnlab.observe.inputs import Inputs

RAGGED = [torch.randn(4, 2), torch.randn(4, 2), torch.randn(1, 2)]


def test_batches_of_another_size_are_left_out_and_counted():
    inputs, notes = inputs_of_size(Inputs(data=RAGGED, train_data=RAGGED[:2]), 4)
    assert [len(batch) for batch in inputs.data] == [4, 4]
    assert [len(batch) for batch in inputs.train_data] == [4, 4]
    assert notes == ("data: 1 batch of another size left out",)


def test_inputs_that_need_no_choice_stay_as_they_are():
    for inputs, size in (
        (Inputs(data=RAGGED), None),
        (Inputs(), 4),
        (Inputs(data=RAGGED, forward=lambda model, batch: model(batch)), 4),
    ):
        assert inputs_of_size(inputs, size) == (inputs, ())


def test_data_without_any_batch_of_the_size_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match=r"data: every batch must have 3 samples.*got 4. Pass batches of this size"):
        inputs_of_size(Inputs(data=RAGGED), 3)
    with pytest.raises(UsageError, match="batches: every batch must have 3 samples"):
        list(BatchesOfSize(RAGGED, 3))


def test_batches_can_be_iterated_again():
    batches = BatchesOfSize(RAGGED, 4)
    assert [len(batch) for _ in range(2) for batch in batches] == [4, 4, 4, 4]
    assert batches.note == "1 batch of another size left out"
    assert [len(batch) for batch in BatchesOfSize(RAGGED, 1)] == [1]
    whole = BatchesOfSize(RAGGED[:2], 4)
    list(whole)
    assert whole.note is None
    assert list(BatchesOfSize([], 4)) == []
