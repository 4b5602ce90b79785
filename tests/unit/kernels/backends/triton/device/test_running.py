"""How a batch moves the running statistics and the counters."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device import running
from bnlab.kernels.backends.triton.launching import pair

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@triton.jit
def _divide(batches, result):
    tl.store(result, running.divisor_of(batches))


def test_the_divisor_counts_this_batch():
    result = torch.zeros(1, dtype=torch.float64)
    _divide[(1,)](torch.tensor(6), result)
    assert float(result) == 7
    _divide[(1,)](None, result)
    assert float(result) == 1


@triton.jit
def _update(moments, channels, mean, var, batches, skipped, high, low, skips: tl.constexpr):
    count = tl.full((), 5.0, tl.float64)
    running.move_everything(moments, channels, count, mean, var, batches, skipped, high, low, skips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, -1.0])
def test_all_channels_move_by_the_weight_of_the_batch(momentum, dtype):
    moments = torch.rand(2, 130, dtype=torch.float64)
    moments[1, 129] = 1e60
    mean, var = torch.randn(130, dtype=dtype), torch.rand(130, dtype=dtype)
    before, counters = (mean.clone(), var.clone()), (torch.tensor(3), torch.tensor(2))
    _update[(1,)](moments, 130, mean, var, *counters, *pair(momentum), True)
    weight = 0.1 if momentum > 0 else 1 / 4
    assert_close(mean, torch.lerp(before[0].double(), moments[0], weight).to(dtype))
    right = torch.lerp(before[1].double(), moments[1] * 1.25, weight)
    assert_close(var, right.clamp(max=torch.finfo(dtype).max).to(dtype))
    assert [int(counter) for counter in counters] == [4, 2]


@pytest.mark.parametrize("skips", [True, False])
def test_one_bad_channel_in_the_last_block_skips_all(skips):
    moments, buffers = torch.rand(2, 130, dtype=torch.float64), (torch.zeros(130), torch.ones(130))
    moments[0, 129] = torch.nan
    counters = torch.tensor(3), torch.tensor(2)
    _update[(1,)](moments, 130, *buffers, *counters, *pair(0.1), skips)
    assert [int(counter) for counter in counters] == ([3, 3] if skips else [4, 2])
    assert bool((buffers[0] == 0).all()) == skips
    assert bool(buffers[0][129].isnan()) != skips
