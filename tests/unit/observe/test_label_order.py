"""Labels in ascending or descending order show that a loader is sorted by class."""

import pytest
import torch

from bnlab.observe.label_order import LabelOrder

SORTED, SAME = "the labels are sorted", "all labels so far are the same"


def clues(*labels):
    order = LabelOrder()
    for of_batch in labels:
        order.add((torch.randn(len(of_batch), 2), of_batch))
    return order.clue(is_everything=False), order.clue(is_everything=True)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 0, 1], [1, 2], [2, 5]], (SORTED, SORTED)),
        ([[5, 5], [5, 2], [0]], (SORTED, SORTED)),
        ([[3, 3], [3, 3]], (SAME, None)),
        ([[0, 1], [0, 1]], (None, None)),
        ([[0, 1, 0], [1, 2]], (None, None)),
        ([[0, 1]], (None, None)),
        ([], (None, None)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_what_the_labels_show(labels, expected, dtype):
    assert clues(*[torch.tensor(one, dtype=dtype) for one in labels]) == expected


@pytest.mark.parametrize(
    "labels", [[torch.tensor([0.0, 1.0])] * 3, [torch.zeros(2, 3, dtype=torch.int64)] * 3, [torch.zeros(0).long()] * 3]
)
def test_what_is_no_class_of_a_sample_shows_nothing(labels):
    assert clues(*labels) == (None, None)


def test_labels_in_a_dict_and_batches_without_any():
    order = LabelOrder()
    order.add(torch.randn(4, 2))
    for label in (0, 1, 2):
        order.add({"x": torch.randn(2, 2), "labels": torch.full((2, 1), label)})
    assert order.clue(is_everything=True) == SORTED
