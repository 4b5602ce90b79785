"""A layer writes the statistics of its last batch, and nothing else, to its scratch buffers."""

import numpy as np
import pytest
import torch
from torch import nn

import bnlab
from bnlab.observe.passes.scratch import ExactScratch, Scratch, scratch_of
from bnlab.observe.passes.subject import untouched


class Other(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnlab.nn.BatchNorm2d])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_the_last_batch_are_exact(kind, layout):
    layer, x = kind(3), (1e3 + torch.randn(8, 3, 5, 5)).to(memory_format=layout)
    with untouched(layer), torch.no_grad():
        scratch = scratch_of(layer)
        scratch.put(x)
        assert scratch.read() is None
        layer(torch.randn(4, 3, 5, 5))
        layer(x)
        mean, var = scratch.read()
        scratch.put(x)
        assert scratch.read() is None
        scratch.take_away()
        assert torch.equal(layer.running_mean, torch.zeros(3))
    values = x.double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(var, values.var(1, ddof=1), rtol=1e-6)
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("has_tensors", [False, True])
def test_buffers_are_on_the_device_of_the_batch(has_tensors):
    layer = bnlab.nn.BatchNorm2d(3, affine=has_tensors, track_running_stats=has_tensors)
    x = torch.randn(4, 3, 5, 5)
    with untouched(layer), torch.no_grad():
        scratch = scratch_of(layer)
        for device in ("meta", "cpu"):
            scratch.put(x.to(device))
            assert {scratch.mean.device.type, layer.running_var.device.type} == {device}
        layer(x)
        mean, var = scratch.read()
    np.testing.assert_allclose(mean, x.double().mean((0, 2, 3)).numpy(), atol=1e-6)
    np.testing.assert_allclose(var, x.double().var((0, 2, 3)).numpy(), rtol=1e-6)


def test_a_layer_that_runs_under_vmap_leaves_no_statistics():
    layer, x = nn.BatchNorm2d(3), torch.randn(2, 8, 3, 5, 5)
    expected = torch.stack([nn.BatchNorm2d(3)(part) for part in x])
    with untouched(layer), torch.no_grad():
        scratch = scratch_of(layer)
        scratch.put(x)
        torch.testing.assert_close(torch.vmap(layer)(x), expected)
        assert scratch.read() is None


@pytest.mark.parametrize(
    "layer",
    [Other(), nn.BatchNorm2d(3).half(), bnlab.nn.GhostBatchNorm2d(4, ghost_size=2), bnlab.nn.FrozenBatchNorm2d(3)],
)
def test_layers_that_write_no_statistics_get_no_scratch(layer):
    assert scratch_of(layer) is None


def test_every_batch_on_a_device_has_buffers_of_its_own(monkeypatch):
    """The host reads them later: what a batch left must still be there when the next ones have run."""
    monkeypatch.setattr("bnlab.observe.transfers._HOST", "no device")
    layer, batches = bnlab.nn.BatchNorm2d(3), [n + torch.randn(4, 3, 5, 5) for n in range(70)]
    with untouched(layer), torch.no_grad():
        scratch, left = scratch_of(layer), []
        for x in batches:
            scratch.put(x)
            layer(x)
            left.append(scratch.buffers)
    for x, (mean, var) in zip(batches, left, strict=True):
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)))
        torch.testing.assert_close(var, x.double().var((0, 2, 3)))


def test_the_kernel_of_torch_runs_on_a_device_where_its_own_statistics_are_wanted():
    with untouched(layer := nn.BatchNorm2d(3)):
        assert type(scratch_of(layer, wants_own=True)) is ExactScratch
    with untouched(layer := nn.BatchNorm2d(3, device="meta")):
        assert type(scratch_of(layer, wants_own=True)) is Scratch
