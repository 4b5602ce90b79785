"""The labels of a batch and the scores of an output are recognised, whatever holds them."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnlab.observe.labels import IGNORED, classes_of, labels_of, scores_of

X, Y, Z = torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.ones(3, 2)


class Pair(NamedTuple):
    points: Tensor
    labels: Tensor


class Graph(NamedTuple):
    x: Tensor
    mask: str
    y: Tensor


@dataclass
class Answer:
    name: str
    scores: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        *((X, Y), [X, Y], (X, Y, Z), ((X, "meta"), Y)),
        *(Pair(X, Y), Graph(X, "mask", Y)),
        *({"x": X, "labels": Y}, {"label": Y}, {"x": X, "targets": Y}, {"target": Y}, {"x": X, "y": Y}),
        *(OrderedDict(label=Z, labels=Y), OrderedDict(y=Z, label=Y)),
        *(SimpleNamespace(x=X, y=Y), SimpleNamespace(labels=Y)),
    ],
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
        {"x": X, "z": Y},
        {"labels": [0]},
        SimpleNamespace(x=X, y=None),
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
        (torch.zeros(3, 2), torch.tensor([0, 1, 1], dtype=torch.uint16)),
        (torch.zeros(3, 2, dtype=torch.bfloat16), torch.tensor([False, True, True])),
        (torch.zeros(2, 5, 4, 4), torch.full((2, 4, 4), 4)),
        (torch.zeros(2, 4, 4, 8), torch.full((2, 4, 8), 3)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_scores_fit_integer_labels_of_their_classes(scores, labels):
    classes = classes_of(scores, labels)
    assert classes.dtype == torch.int64
    assert classes.tolist() == labels.to(torch.int64).tolist()


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(3, 2), torch.tensor([-1, 1, 2])),
        (torch.zeros(3, 2), torch.tensor([2, 2, 2])),
        (torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0])),
        (torch.zeros(3, 2), torch.tensor([0, 1, 1], dtype=torch.complex64)),
        (torch.zeros(3, 2), torch.tensor([0, 1])),
        (torch.zeros(3, 2), torch.tensor([[0], [1], [1]])),
        (torch.zeros(3, 1), torch.tensor([0, 0, 0])),
        (torch.zeros(3), torch.tensor([0, 0, 0])),
        (torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 1, 1])),
        (torch.zeros(2, 5, 4, 4), torch.zeros(2, 4, dtype=torch.int64)),
    ],
)
def test_other_tensors_are_no_scores_of_the_labels(scores, labels):
    assert classes_of(scores, labels) is None


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 4, 4, 4)])
def test_scores_whose_class_axis_is_ambiguous_are_none(shape):
    """(N, L, L) is (N, K, L) of torch, and (N, L, K) of a network that labels every word."""
    assert classes_of(torch.zeros(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)) is None


@pytest.mark.parametrize("void", [-100, -1, 2, 255])
def test_one_value_that_is_no_class_is_ignored(void):
    assert classes_of(torch.zeros(4, 2), torch.tensor([0, void, 1, void])).tolist() == [0, IGNORED, 1, IGNORED]
    assert classes_of(torch.zeros(4, 2), torch.tensor([0, void, 1, void - 50])) is None
    assert classes_of(torch.zeros(2, 2), torch.full((2,), void)) is None


def test_a_large_unsigned_label_is_a_class_where_there_are_so_many():
    """In 8 bits without a sign, -100 is 156."""
    labels = torch.tensor([156, 1], dtype=torch.uint8)
    assert classes_of(torch.zeros(2, 200), labels).tolist() == [156, 1]
    assert classes_of(torch.zeros(2, 10), labels).tolist() == [IGNORED, 1]
    wide = torch.tensor([40_000, 1], dtype=torch.uint16)
    assert classes_of(torch.zeros(2, 50_000), wide).tolist() == [40_000, 1]
