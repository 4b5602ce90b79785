"""The text on a batch that does not fit a forward."""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.observe.passes.misfit import described, misfit, misfit_of_dtype
from bnlab.observe.passes.signatures import signature_of


class Fields(NamedTuple):
    data: torch.Tensor
    target: int


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    name: str


X = torch.ones(8, 3)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (X, "float32 (8, 3)"),
        (torch.ones((), dtype=torch.int64), "int64 ()"),
        ((X,), "(float32 (8, 3),)"),
        ([X, 3], "[float32 (8, 3), int]"),
        (["a"] * 8, "[8 of str]"),
        ({"image": X, "meta": {"id": 3, 7: None}}, '{"image": float32 (8, 3), "meta": {"id": int, 7: None}}'),
        (collections.OrderedDict(x=X), 'OrderedDict({"x": float32 (8, 3)})'),
        (Fields(X, 3), "Fields(float32 (8, 3), int)"),
        (
            {str(number): number for number in range(9)},
            '{"0": int, "1": int, "2": int, "3": int, "4": int, "5": int, ...}',
        ),
        ([[[[X]]]], "[[[[...]]]]"),
        ((), "()"),
        ({}, "{}"),
        (nn.Identity(), "Identity"),
        ([np.ones((2, 3), np.float32), 1], "[ndarray float32 (2, 3), int]"),
        (Sample(X, "a"), "Sample(image=float32 (8, 3), name=str)"),
    ],
)
def test_structure(batch, text):
    assert described(batch) == text


def test_message_without_a_signature():
    text = misfit(nn.Identity(), {"a": X}, None)
    assert text == (
        'Identity: a batch must fit forward, got {"a": float32 (8, 3)}. Pass forward=lambda model, batch: '
        'model(batch["a"]).'
    )


def test_message_on_a_dtype():
    model, batch = nn.Linear(3, 2).half(), {"size": torch.ones(8, dtype=torch.int64), "input": X}
    assert misfit_of_dtype(model, batch, signature_of(model)) == (
        'Linear: a batch must have the dtype of the model, float16, got {"size": int64 (8,), "input": float32 (8, 3)}. '
        'Pass forward=lambda model, batch: model(batch["input"].to(torch.float16)).'
    )
    assert misfit_of_dtype(model, X.half(), None) is None
    assert misfit_of_dtype(model, torch.ones(8, dtype=torch.int64), None) is None
    assert misfit_of_dtype(nn.ReLU(), X, None) is None


def test_images_come_before_labels_and_names_before_places():
    class Two(nn.Module):
        def forward(self, picture, size):
            return picture

    batch = {"label": torch.zeros(8, dtype=torch.int64), "size": torch.ones(8, 2), "raw": torch.ones(8, 3, 4, 4)}
    assert misfit(Two(), batch, signature_of(Two())).endswith('model(batch["raw"], batch["size"]).')


def test_a_batch_without_tensors():
    assert misfit(nn.Identity(), ["a", "b"], None).endswith("Pass forward=lambda model, batch: model(...).")
