import pytest
import torch

from bnlab.remedies.convert.sizes import WatchedSizes

X = torch.zeros(4, 3, 2, 2)


def compared(look):
    watched = WatchedSizes()
    with watched:
        look(X)
    return watched.compared


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.shape[0] > 3,
        lambda x: x.size(0) == 3,
        lambda x: x.numel() / x.size(1) > 3,
        lambda x: 2 if x.shape[0] * 2 - 8 else 3,
        lambda x: int(x.shape[0]),
        lambda x: len(x),
        lambda x: x.shape == (4, 3, 2, 2),
        lambda x: max(x.size(0) - 1, 1),
    ],
)
def test_a_comparison_is_noted(look):
    assert compared(look)


@pytest.mark.parametrize(
    "look", [lambda x: x.view(x.shape[0], -1), lambda x: x.mean() * (x.numel() / x.size(1)), lambda x: x.dim() == 4]
)
def test_arithmetic_is_not(look):
    assert not compared(look)


def test_sizes_calculate_like_numbers():
    with WatchedSizes():
        assert float(X.numel() / (X.numel() - 1)) == pytest.approx(48 / 47)
        assert [*range(X.shape[1])] == [0, 1, 2]
        assert (X.shape[0] + 1) * 2 == 10
