"""The comparisons behind the cells refuse what is wrong."""

from __future__ import annotations

import pytest
import torch
from tests.integration.case import batch_norm_layers, batch_statistics, flat, images
from tests.integration.cells import assert_same, difference, state
from tests.integration.networks import network


@pytest.mark.parametrize("change", ["bit", "class", "mode", "requires_grad", "key"])
def test_a_model_that_is_not_restored_is_refused(change):
    model = network()
    before = state(model)
    assert_same(model, before)
    if change == "bit":
        model[1].weight.data.view(torch.int32)[0] ^= 1
    elif change == "class":
        model[2] = torch.nn.Identity()
    elif change == "mode":
        model[1].eval()
    elif change == "requires_grad":
        model[1].bias.requires_grad_(False)
    else:
        model[1].register_buffer("more", torch.zeros(1))
    with pytest.raises(AssertionError):
        assert_same(model, before)


def test_the_difference_is_relative_and_covers_every_tensor_of_an_output():
    assert difference({"a": torch.tensor([10.0]), "b": [torch.tensor([1.0])]}, [torch.tensor([10.0, 2.0])]) == 0.1
    assert flat({"ids": torch.tensor([1]), "x": (torch.tensor([2.0]),)}).tolist() == [2.0]


def test_batch_statistics_change_nothing_with_a_momentum_of_0():
    model = network().eval()
    before = state(model)
    with batch_statistics(model, momentum=0.0), torch.no_grad():
        assert all(layer.training for layer in batch_norm_layers(model))
        model(images()[0])
    assert_same(model, before)
