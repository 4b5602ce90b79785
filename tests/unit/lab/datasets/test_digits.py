import sys

import pytest
import torch

from bnlab.errors import MissingPackage
from bnlab.lab import datasets
from bnlab.lab.datasets import digits


def test_digits_are_split_as_for_the_stuck_statistics():
    pytest.importorskip("sklearn")
    images, labels = digits.read_all().batch()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = order[: len(order) // 4]
    assert torch.equal(digits.read("test").pixels / 16, images[held_out])
    assert torch.equal(digits.read("train").labels, labels[order[len(held_out) :]])
    assert (len(held_out), len(digits.read("train").labels)) == (449, 1348)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[lab\]'"):
        datasets.load("digits")
