import torch
from torch import nn

import bnlab
from bnlab.observe.transfers import Pending
from bnlab.watching.buffers import Buffers


def layers():
    return [nn.BatchNorm2d(3), nn.BatchNorm1d(2, track_running_stats=False), bnlab.nn.BatchNorm2d(4), nn.BatchNorm1d(5)]


def read(method):
    results = {}
    method(results.update)
    return results


def test_values_that_are_not_finite_are_counted_for_each_layer():
    own = layers()
    own[0].running_var[1:] = float("nan")
    own[2].running_mean[0] = float("inf")
    buffers = Buffers(own, Pending())
    assert read(buffers.not_finite) == {0: 2.0, 2: 1.0, 3: 0.0}
    own[3].running_mean.fill_(-float("inf"))
    assert read(buffers.not_finite) == {0: 2.0, 2: 1.0, 3: 5.0}


def test_huge_finite_values_count_as_finite():
    layer = nn.BatchNorm1d(2)
    layer.running_var.fill_(torch.finfo(torch.float32).max)
    assert read(Buffers([layer], Pending()).not_finite) == {0: 0.0}


def test_counters_are_read_by_index():
    own = layers()
    own[2](torch.randn(2, 4, 3, 3))
    own[2](torch.full((2, 4, 3, 3), float("nan")))
    buffers = Buffers(own, Pending())
    assert read(buffers.counters) == {0: 0, 2: 1, 3: 0}
    assert read(buffers.kept_out) == {2: 1}
