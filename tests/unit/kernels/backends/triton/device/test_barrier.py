"""The counters with which programs wait: zero before and after. The interpreter runs one program at a time."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device.barrier import is_last, leave, wait_for_team

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@triton.jit
def _last(counter, results, number):
    last = is_last(counter, number)
    tl.store(results + tl.program_id(0), last.to(tl.int32))


def test_one_program_is_the_last_and_the_counter_is_zero_again():
    counter = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        results = torch.zeros(3, dtype=torch.int32)
        _last[(3,)](counter, results, 3)
        assert results.tolist() == [0, 0, 1]
        assert int(counter) == 0


@triton.jit
def _meet(counters, seen, meetings):
    team = tl.program_id(0)
    for meeting in range(meetings):
        wait_for_team(counters + 2 * team, 1, meeting)
        tl.store(seen + team, tl.load(counters + 2 * team))
    leave(counters + 2 * team, counters + 2 * team + 1, 1)


def test_a_team_of_one_meets_again_and_leaves_zeros():
    counters, seen = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    _meet[(2,)](counters, seen, 3)
    assert seen.tolist() == [3, 3]
    assert counters.tolist() == [0, 0, 0, 0]


@triton.jit
def _leave(counters, size):
    leave(counters, counters + 1, size)


def test_only_the_last_to_leave_resets_the_counters():
    counters = torch.tensor([3, 0], dtype=torch.int32)
    _leave[(2,)](counters, 3)
    assert counters.tolist() == [3, 2]
    _leave[(1,)](counters, 3)
    assert counters.tolist() == [0, 0]
