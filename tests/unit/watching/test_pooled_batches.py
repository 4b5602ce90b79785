from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnlab.watching import pooled_batches
from bnlab.watching.pooled_batches import Block, CompiledPool, Pool, Rule

sizes = st.lists(st.integers(2, 7), min_size=1, max_size=70)


def parts_of(sizes):
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(len(sizes))).double()
    values += torch.arange(len(values))[:, None]
    return values, values.split(sizes)


def add_all(pool, parts):
    for part in parts:
        mean, var = part.mean(0), part.var(0, correction=0)
        if isinstance(pool, CompiledPool):
            pool.add(mean, var * len(part), torch.tensor(float(len(part))), torch.tensor(True))
        else:
            pool.add(mean, var, len(part))


def require(block, values):
    assert float(block.count) == len(values)
    torch.testing.assert_close(block.mean, values.mean(0), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(block.m2, values.var(0) * (len(values) - 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.statistics.var, values.var(0, correction=0), rtol=1e-12, atol=1e-12)


@given(sizes)
def test_micro_batches_pool_to_the_whole_batch(sizes):
    values, parts = parts_of(sizes)
    pool = Pool(Rule())
    add_all(pool, parts)
    assert pool.batches == len(parts)
    pooled = pool.take()
    require(pooled.block, values)
    assert pooled.rejected == 0
    assert pool.take() == (None, 0)


def test_the_mean_of_the_variances_is_not_the_variance_of_the_whole():
    values, parts = parts_of([3, 5, 4])
    wrong = torch.stack([part.var(0) for part in parts]).mean(0) * (len(values) - 1)
    with pytest.raises(AssertionError):
        require(Block(float(len(values)), values.mean(0), wrong), values)


@given(sizes)
def test_a_device_that_nothing_may_wait_for_leads_to_the_same(sizes):
    values, parts = parts_of(sizes)
    with mock.patch.object(pooled_batches, "is_readable", return_value=False):
        pool = Pool(Rule())
        add_all(pool, [*parts, torch.full((4, 3), torch.inf), values[:1]])
        pooled = pool.take()
        compiled = CompiledPool(Rule(), torch.zeros(3))
        add_all(compiled, [*parts, torch.full((4, 3), torch.inf), values[:1]])
        of_compiled, batches = compiled.take()
        assert int(compiled.take()[1]) == 0
    for one in (pooled, of_compiled):
        require(one.block, values)
        assert int(one.rejected) == 2
    assert int(batches) == len(parts) + 2


def test_what_is_no_new_pass_does_not_count_in_compiled_code():
    pool = CompiledPool(Rule(), torch.zeros(3))
    pool.add(torch.ones(3).double(), torch.ones(3).double(), torch.tensor(5.0), torch.tensor(False))
    assert pool.take() == ((None, 0), 0)


@pytest.mark.parametrize(
    ("rule", "rejected"), [(Rule(), 2), (Rule(fewest=1), 1), (Rule(keeps_nonfinite=True), 1)], ids=str
)
def test_the_rule_says_which_micro_batches_count(rule, rejected):
    values, parts = parts_of([4])
    pool = Pool(rule)
    add_all(pool, [*parts, values[:1], torch.full((4, 3), torch.nan)])
    assert pool.take().rejected == rejected
