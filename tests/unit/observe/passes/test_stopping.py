"""Looking again and again does not stop a pass when chance is kind."""

import math

import numpy as np
import pytest

from bnlab.observe.passes.stopping import Looks
from bnlab.observe.standard_errors import BatchTotals


def looked_at(standard_error_after, wanted, left_out=0):
    """Return the batches after which a pass looks, until it may stop."""
    looks, places = Looks(wanted), []
    for index in range(1, 10_000):
        if looks.is_due(index):
            places.append(index)
            batches = max(index - left_out, 0)
            if looks.may_stop(index, batches, standard_error_after(batches)):
                return places
    return places


def test_looks_come_when_enough_should_be_read():
    assert looked_at(lambda n: 0.1, 0.1) == [8]
    assert looked_at(lambda n: 1 / math.sqrt(n), 0.1) == [8, 16, 32, 64, 100]
    assert looked_at(lambda n: (1.001 if n > 70 else 1) / math.sqrt(n), 0.1) == [8, 16, 32, 64, 100, 107]
    assert looked_at(lambda n: math.inf if n < 20 else 0.0, 0.1) == [8, 16, 32]


def test_batches_that_are_left_out_are_made_up_for():
    assert looked_at(lambda n: 0.0, 0.1, left_out=5) == [8, 13]


def stopped(generator, wanted):
    """Return the error of the mean of batches of four normal values, in standard errors and in wanted ones."""
    totals, looks = BatchTotals(1), Looks(wanted)
    for index in range(1, 10_000):
        values = generator.standard_normal((4, 1))
        totals.add(4, values.mean(0), values.var(0, ddof=1))
        totals.end_batch()
        if looks.is_due(index):
            error = float(totals.errors().mean[0])
            if looks.may_stop(index, index, error):
                mean = abs(float(totals.mean[0]))
                return mean / error, mean / wanted
    raise AssertionError


def naively_stopped(generator, wanted):
    """Return the same for a look after every batch, without a smallest number and a factor for few batches."""
    means = generator.standard_normal((400, 4)).mean(1)
    for count in range(2, 400):
        error = means[:count].std(ddof=1) / math.sqrt(count)
        if error <= wanted:
            mean = abs(means[:count].mean())
            return mean / error, mean / wanted
    raise AssertionError


@pytest.mark.parametrize("wanted", [0.2, 0.12])  # 6 and 17 batches
def test_errors_at_the_stop_are_covered_as_a_standard_error_promises(wanted):
    generator = np.random.default_rng(0)
    scores, of_wanted = np.array([stopped(generator, wanted) for _ in range(300)]).T
    assert 0.5 < np.median(scores) < 0.8
    assert 1.6 < np.quantile(scores, 0.95) < 2.4
    assert np.sqrt(np.mean(of_wanted**2)) < 1.15


def test_the_test_catches_a_stop_at_the_first_lucky_look():
    generator = np.random.default_rng(0)
    scores, of_wanted = np.array([naively_stopped(generator, 0.12) for _ in range(300)]).T
    assert np.quantile(scores, 0.95) > 2.8
    assert np.sqrt(np.mean(of_wanted**2)) > 1.3
