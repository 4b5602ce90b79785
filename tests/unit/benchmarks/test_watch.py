"""The training loops of the benchmark, each with one network and one seed."""

import pytest
import torch
from benchmarks.watch import is_right
from benchmarks.watching.healthy import HEALTHY
from benchmarks.watching.loop import Outcome
from benchmarks.watching.networks import NETWORKS
from benchmarks.watching.planted import PLANTED

ALONE = [loop for loop in (*PLANTED, *HEALTHY) if "ranks" not in loop.name]


@pytest.mark.parametrize("loop", ALONE, ids=lambda loop: loop.name)
def test_the_first_event_of_a_loop_is_the_planted_one(loop):
    build = NETWORKS["mobile" if ALONE.index(loop) % 2 else "residual"]
    assert is_right(loop, build, seed=17)


def test_another_step_layer_or_code_is_not_right():
    loop = next(loop for loop in PLANTED if loop.code == "BN605")
    torch.manual_seed(0)
    outcome = loop.run(NETWORKS["residual"])
    assert outcome.is_right("BN605")
    assert not outcome.is_right("BN606")
    assert not outcome.is_right(None)
    outcome.step += 1
    assert not outcome.is_right("BN605")
    assert not Outcome().is_right("BN605")
    assert Outcome().is_right(None)
