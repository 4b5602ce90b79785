"""New statistics are written in place, all or none, and can be taken back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.remedies.running_statistics import distance_in_std, statistics_text, stored_statistics, write_statistics


@pytest.fixture
def layers(device):
    return {"a": nn.BatchNorm1d(2).to(device), "b": nn.BatchNorm1d(2).to(device)}


def values(mean, var):
    return np.array(mean, dtype=np.float64), np.array(var, dtype=np.float64)


def test_buffers_keep_their_identity_and_get_the_values_and_undo_gives_the_old_ones_back(layers):
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    written = write_statistics(layers, {"a": values([1, 2], [3, 4]), "b": values([5, 6], [7, 8])})
    assert all(
        now is buffer for now, buffer in zip((b for x in layers.values() for b in x.buffers()), buffers, strict=True)
    )
    np.testing.assert_array_equal(stored_statistics(layers)["b"], [[5, 6], [7, 8]])
    written.undo()
    assert all(torch.equal(*pair) for pair in zip(buffers, before, strict=True))


def test_what_was_changed_later_is_not_overwritten_by_undo(layers):
    written = write_statistics(layers, {"a": values([1, 2], [3, 4])})
    layers["a"].running_mean += 1
    with pytest.raises(UsageError, match="undo: running statistics of a must be unchanged, got other values"):
        written.undo()


def test_values_beyond_the_dtype_become_its_largest_and_are_counted(device):
    layer = nn.BatchNorm1d(2).to(device).half()
    written = write_statistics({"a": layer}, {"a": values([1e6, 0], [1, 1e9])})
    assert written.clipped == {"a": 2}
    assert layer.running_mean[0] == torch.finfo(torch.float16).max


def test_how_far_outputs_move_is_the_root_mean_square_over_the_new_data():
    old, new, eps = values([0.0], [1.0]), values([3.0], [4.0]), 1e-5
    x = np.random.default_rng(0).normal(3.0, 2.0, 200_000)
    difference = (x - 0) / np.sqrt(1 + eps) - (x - 3) / np.sqrt(4 + eps)
    assert distance_in_std(old, new, eps) == pytest.approx(np.sqrt((difference**2).mean()), rel=0.01)
    assert distance_in_std(values([0.0], [-1.0]), new, eps) == float("inf")
    assert distance_in_std(new, new, eps) == 0


def test_ranges_as_text():
    assert statistics_text(*values([0, 1.5], [1, np.nan])) == "mean 0..1.5, var 1 not finite"


def test_inference_tensors_are_named_before_anything_changes(layers, device):
    with torch.inference_mode():
        layers["b"] = nn.BatchNorm1d(2, device=device)
    new = {"a": values([1, 2], [3, 4]), "b": values([5, 6], [7, 8])}
    with pytest.raises(UsageError, match=r"^b: buffers must be tensors that can change, got inference tensors\. Copy"):
        write_statistics(layers, new)
    assert layers["a"].running_mean.tolist() == [0, 0]
    write_statistics(copy.deepcopy(layers), new)
