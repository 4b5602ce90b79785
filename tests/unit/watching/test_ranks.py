import pytest
import torch
from torch import nn

from bnlab.watching.ranks import Ranks, _packed, _range_of_normals, _rows, _spread, _unpacked


def test_without_other_ranks_nothing_is_compared():
    compared = []
    ranks = Ranks([nn.BatchNorm1d(3)], lambda _: (1.0, 1.0), lambda index, spread: compared.append(index))
    ranks.send(1, None)
    ranks.receive()
    assert compared == []


def test_the_statistics_of_a_layer_travel_as_bytes_without_code():
    layer = nn.BatchNorm1d(300)
    layer.running_mean.normal_()
    rows = [_rows(layer)]
    assert rows[0].shape[0] == 2
    assert rows[0].shape[1] <= 64
    (received,) = _unpacked(_packed(rows))
    assert torch.equal(received, rows[0])
    assert _unpacked(b"") == []
    assert _rows(nn.BatchNorm1d(3, track_running_stats=False)).shape == (2, 0)


def test_the_range_of_normal_values():
    assert _range_of_normals(2) == pytest.approx(2**0.5, rel=0.02)
    assert _range_of_normals(8) == pytest.approx(2.96, rel=0.02)


def test_ranks_with_the_same_data_differ_by_their_noise_and_others_by_more():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(400, momentum=0.1)

    def settled(shift):
        own = nn.BatchNorm1d(400, momentum=0.1)
        for _ in range(100):
            own(torch.randn(16, 400) + shift)
        return torch.stack([own.running_mean, own.running_var]).double()

    noise = (1 / 16, 1 / (2 * 15))  # the variances of a batch mean and of ln(var)/2
    same = _spread(7, torch.stack([settled(0), settled(0)]), noise, layer)
    other = _spread(7, torch.stack([settled(0), settled(1)]), noise, layer)
    assert (same.step, same.ranks) == (7, 2)
    assert same.difference / same.expected == pytest.approx(1, abs=0.15)
    assert other.difference == pytest.approx(1, abs=0.2)
    assert other.difference / other.expected > 5
