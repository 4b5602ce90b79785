"""The second pass of the forward direction."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.kernels.backends.triton.device.forward import normalise_kernel, train_kernel
from bnlab.kernels.backends.triton.geometry import geometry_of
from bnlab.kernels.backends.triton.launching import pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@pytest.mark.parametrize("bad", [None, 0, 129])
def test_one_note_among_many_skips_the_update(bad):
    x, y, moments = torch.randn(4, 3), torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.float64)
    notes = torch.ones(131, dtype=torch.float64)
    if bad is not None:
        notes[bad] = 0
    mean, var = x.double().mean(0), x.double().var(0, correction=0)
    parts = torch.stack([torch.full((3,), 4.0).double(), mean, var * 4])
    running = torch.zeros(3), torch.ones(3), torch.tensor(0), torch.tensor(0)
    tensors = (x, None, y, None, parts, notes, None, None, moments, None, None, *running)
    form = geometry_of(x, 64).form(64, 1, 8)
    normalise_kernel[(1,)](*tensors, 4, 3, 4, 1, 1, 130, *pair(1e-5), *pair(0.5), 0.0, form, 0, True)
    assert_close(y.double(), (x - mean) / (var + 1e-5).sqrt(), rtol=1e-5, atol=1e-6)
    assert_close(moments, torch.stack([mean, var]))
    assert [int(counter) for counter in running[2:]] == [bad is None, bad is not None]
    assert_close(running[0].double(), mean / 2 if bad is None else torch.zeros(3).double(), rtol=1e-6, atol=1e-7)


def test_one_launch_does_all_groups_and_leaves_zeros():
    x, y, moments = torch.randn(2, 40), torch.zeros(2, 40), torch.zeros(2, 40, dtype=torch.float64)
    geometry = geometry_of(x, 64)
    teams, counters = geometry.groups, torch.zeros(2 * geometry.groups + 1, dtype=torch.int32)
    running = torch.zeros(40), torch.ones(40), torch.tensor(0), torch.tensor(0)
    tensors = (x, None, y, None, None, counters, moments, None, None, *running)
    numbers = (2, 40, geometry.groups, 1, teams, 2, *pair(1e-5), *pair(0.5), 0.25)
    train_kernel[(teams,)](*tensors, *numbers, geometry.form(64, 1, 8), 2, True, True)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    assert_close(y.double(), torch.nn.functional.leaky_relu(expected, 0.25), rtol=1e-5, atol=1e-5)
    assert_close(running[0], x.mean(0) / 2)
    assert_close(running[1], 0.5 + x.var(0) / 2)
    assert (int(running[2]), int(running[3]), int(counters.abs().sum())) == (1, 0, 0)
