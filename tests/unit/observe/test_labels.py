"""The labels of a batch and the scores of an output are recognised, whatever holds them."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnlab.observe.labels import are_scores_of, labels_of, scores_of

X, Y, Z = torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.ones(3, 2)


class Pair(NamedTuple):
    points: Tensor
    labels: Tensor


@dataclass
class Answer:
    name: str
    scores: Tensor


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], (X, Y, Z), Pair(X, Y), {"x": X, "labels": Y}, {"label": Y}, OrderedDict(label=Z, labels=Y)],
)
def test_the_labels_of_a_batch_are_recognised(batch):
    assert labels_of(batch) is Y


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X,),
        (),
        [],
        (X, [0, 1, 1]),
        (X, {"y": Y}),
        (X, torch.tensor(1)),
        {"x": X, "y": Y},
        {"labels": [0]},
        None,
        "ab",
    ],
)
def test_a_batch_without_labels_has_none(batch):
    assert labels_of(batch) is None


@pytest.mark.parametrize(
    "output",
    [
        Z,
        (Z, X),
        [Z],
        ((Z, X), X),
        {"aux": X, "out": Z},
        {"hidden": X, "logits": Z},
        {"logits": Z, "out": X},
        {"first": Z, "second": X},
        {"logits": None, "first": Z},
        SimpleNamespace(loss=X, logits=Z),
        (SimpleNamespace(logits=Z), X),
        Answer("a", Z),
    ],
)
def test_the_scores_of_an_output_are_recognised(output):
    assert scores_of(output) is Z


@pytest.mark.parametrize("output", [None, 1.0, "logits", (), [], {}, {"logits": [1.0]}, ("a", Z), SimpleNamespace(a=Z)])
def test_an_output_without_scores_has_none(output):
    assert scores_of(output) is None


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1, 1])),
        (torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1], dtype=torch.uint8)),
        (torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor([False, True, True])),
        (torch.zeros(2, 5, 4, 4), torch.full((2, 4, 4), 4)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_scores_fit_integer_labels_of_their_classes(scores, labels):
    assert are_scores_of(scores, labels)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1, 2])),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1])),
        (torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0])),
        (torch.zeros(3, 2), torch.tensor([0, 1])),
        (torch.zeros(3, 2), torch.tensor([[0], [1], [1]])),
        (torch.zeros(3, 1), torch.tensor([0, 0, 0])),
        (torch.zeros(3), torch.tensor([0, 0, 0])),
        (torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 1, 1])),
        (torch.zeros(2, 5, 4, 4), torch.zeros(2, 4, dtype=torch.int64)),
    ],
)
def test_other_tensors_are_no_scores_of_the_labels(scores, labels):
    assert not are_scores_of(scores, labels)


def test_an_ignored_label_fits_only_where_it_is_allowed():
    scores, labels = torch.zeros(3, 2), torch.tensor([0, -100, 1])
    assert are_scores_of(scores, labels, ignored=-100)
    assert not are_scores_of(scores, labels)
    assert not are_scores_of(scores, labels, ignored=-1)
    assert are_scores_of(scores, torch.full((3,), -100), ignored=-100)


def test_an_unsigned_label_is_not_taken_for_an_ignored_one():
    """In 8 bits without a sign, -100 is 156."""
    assert not are_scores_of(torch.zeros(2, 10), torch.tensor([156, 1], dtype=torch.uint8), ignored=-100)
    assert are_scores_of(torch.zeros(2, 200), torch.tensor([156, 1], dtype=torch.uint8), ignored=-100)
