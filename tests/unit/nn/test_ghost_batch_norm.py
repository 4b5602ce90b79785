import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError

GhostBatchNorm1d, GhostBatchNorm2d = bnlab.nn.GhostBatchNorm1d, bnlab.nn.GhostBatchNorm2d


@given(n=st.integers(2, 40), size=st.integers(40, 100))
def test_one_virtual_batch_is_bn(device, n, size):
    ghost, plain = GhostBatchNorm2d(3, ghost_size=size).to(device), bnlab.nn.BatchNorm2d(3).to(device)
    x = torch.randn(n, 3, 4, 4).to(device)
    assert torch.equal(ghost(x), plain(x))
    assert_close(ghost.state_dict(), plain.state_dict(), rtol=0, atol=0)


def parts_of(x, size):
    return x.tensor_split(max(1, len(x) // size))


@given(n=st.integers(2, 33), size=st.integers(2, 12), momentum=st.sampled_from([0.1, 0.5, None]))
def test_parts_are_batches_of_their_own_one_after_the_other(device, n, size, momentum):
    torch.manual_seed(n)
    x = torch.randn(n, 3, 5).to(device)
    ghost, plain = (
        GhostBatchNorm1d(3, ghost_size=size, momentum=momentum).to(device),
        bnlab.nn.BatchNorm1d(3, momentum=momentum).to(device),
    )
    expected = torch.cat([plain(part) for part in parts_of(x, size)])
    assert torch.equal(ghost(x), expected)
    assert_close(ghost.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert ghost.num_batches_tracked == max(1, n // size)
    assert min(len(part) for part in parts_of(x, size)) >= min(size, n)


def test_the_buffers_are_those_of_hoffers_sum(device):
    a, x = 0.3, torch.randn(12, 2, dtype=torch.float64).to(device)
    layer = GhostBatchNorm1d(2, ghost_size=3, momentum=a).to(device).double()
    layer.running_mean.fill_(7)
    layer(x)
    means = [part.mean(0) for part in x.split(3)]
    expected = (1 - a) ** 4 * 7 + sum(a * (1 - a) ** (4 - i) * mean for i, mean in enumerate(means, 1))
    assert_close(layer.running_mean, expected)
    pooled = (1 - a) * 7 + a * x.mean(0)
    with pytest.raises(AssertionError):
        assert_close(layer.running_mean, pooled)


def test_eval_mode_is_that_of_bn(device):
    ghost, plain = GhostBatchNorm2d(3, ghost_size=2).to(device), nn.BatchNorm2d(3).to(device)
    x = torch.randn(8, 3, 4, 4).to(device)
    ghost(x)
    plain.load_state_dict(ghost.state_dict())
    assert_close(ghost.eval()(x), plain.eval()(x))


def test_only_the_bad_part_is_skipped(device):
    layer, x = GhostBatchNorm2d(3, ghost_size=2).to(device), torch.randn(8, 3, 4, 4).to(device)
    x[3] = float("inf")
    layer(x)
    assert (layer.num_batches_tracked, layer.skipped_batches) == (3, 1)


def test_a_mask_is_split_with_the_batch(device):
    x, keep = torch.randn(8, 3, 6).to(device), torch.rand(8, 6).to(device) > 0.3
    ghost, plain = GhostBatchNorm1d(3, ghost_size=4).to(device), bnlab.nn.BatchNorm1d(3).to(device)
    expected = torch.cat([plain(x[:4], mask=keep[:4]), plain(x[4:], mask=keep[4:])])
    assert torch.equal(ghost(x, mask=keep), expected)
    assert_close(ghost.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_a_bad_size_is_refused(size):
    with pytest.raises(UsageError, match="GhostBatchNorm1d: ghost_size must be an integer >= 1, got"):
        GhostBatchNorm1d(3, ghost_size=size)


def test_parts_of_one_value_are_refused(device):
    layer = GhostBatchNorm1d(3, ghost_size=1).to(device)
    with pytest.raises(UsageError) as err:
        layer(torch.randn(4, 3).to(device))
    assert str(err.value) == (
        "GhostBatchNorm1d: ghost_size must leave more than 1 value per channel in each virtual batch, "
        "got 1 for an input of shape (4, 3). Use a larger one."
    )
    assert layer(torch.randn(4, 3, 5).to(device)).shape == (4, 3, 5)
    assert layer(torch.randn(0, 3).to(device)).shape == (0, 3)


def test_repr(device):
    assert "track_running_stats=True, ghost_size=16, backend=" in repr(GhostBatchNorm1d(3, ghost_size=16).to(device))
