"""Samples keep their order, their labels and their number when batches are joined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.regroup import regrouped


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    samples=st.integers(1, 20),
)
@settings(max_examples=50, deadline=None)
def test_samples_and_labels_are_kept_in_order(sizes, samples):
    total = sum(sizes)
    values = torch.arange(total, dtype=torch.float32)
    data = list(zip(values[:, None].split(sizes), values.long().split(sizes), strict=True))
    joined = regrouped(keep("data", data, None), samples)
    assert torch.equal(torch.cat([x for x, _ in joined])[:, 0], values)
    assert torch.equal(torch.cat([y for _, y in joined]), values.long())
    assert all(len(y) >= min(samples, total) for _, y in joined)


def test_dicts_and_scalars_are_kept():
    data = [{"x": torch.full((2, 3), float(i)), "scale": torch.tensor(2.0)} for i in range(4)]
    (batch,) = regrouped(keep("data", data, None), 8)
    assert batch["x"].shape == (8, 3)
    assert batch["scale"] == 2


@pytest.mark.parametrize(
    "data",
    [
        [torch.zeros(1, 3), torch.zeros(1, 4)],
        [torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.float64)],
        [(torch.zeros(1, 3), torch.zeros(7, 2)), (torch.zeros(1, 3), torch.zeros(7, 2))],
        [(torch.zeros(1, 3),), (torch.zeros(1, 3), torch.zeros(1))],
        ["a", "b"],
    ],
    ids=["shapes", "dtypes", "a graph", "other parts", "no tensors"],
)
def test_samples_that_do_not_fit_together_are_not_joined(data):
    assert regrouped(keep("data", data, None), 2) is None
