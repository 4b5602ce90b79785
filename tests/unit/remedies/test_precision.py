"""The sentences of a receipt on how exact recalibrated statistics are."""

import numpy as np
import pytest

from bnlab.observe.passes.pooling import End, Pooled, Pooling
from bnlab.observe.standard_errors import MomentErrors
from bnlab.remedies.precision import passes_note, source_note, why_not_reached


def pooled(mean_error, var_error=0.0, batches=12):
    """Return a layer with two channels of variance 1, of which the second one is exact."""
    errors = MomentErrors(
        batches=batches,
        mean=np.array([mean_error, 0.0]),
        population_var=np.array([var_error, 0.0]),
        within_var=np.zeros(2),
    )
    return layer(errors)


def layer(errors):
    ones = np.ones(2)
    return Pooled(
        batches=1, count=9, mean=0 * ones, population_var=ones, within_var=ones, eps=0.0, errors=errors, order_score=0.0
    )


def pooling(layers, end=End.DATA, order=None, batches=12):
    return Pooling(
        layers=layers, batches=batches, samples=100 * batches, not_finite=0, one_value=0, end=end, order=order
    )


SOURCE = "from 12 batches, 1,200 samples"
RULE = "batches: their standard error must be at most standard_error=0.01 before they end"
TWO = {"a": pooled(0.02), "b": pooled(0.01, 0.1)}
"""The largest standard error is 0.05: that of half the log of a variance."""


@pytest.mark.parametrize(
    ("result", "wanted", "note"),
    [
        (
            pooling(TWO),
            None,
            f"{SOURCE}; 3,334 samples are enough for a standard error of 0.03 std",
        ),
        (
            pooling(TWO, End.REACHED),
            0.05,
            (
                f"{SOURCE}: the pass stops at a standard error of 0.05 std, 0.05 std wanted (largest "
                "for the variance of channel 0 in b)"
            ),
        ),
        (
            pooling({"": pooled(0.02)}),
            0.01,
            (
                f"{SOURCE}: the data end at a standard error of 0.02 std, 0.01 std wanted (largest for "
                "the mean of channel 0 in the model itself); 4,800 samples are enough"
            ),
        ),
        (
            pooling(TWO, End.LIMIT),
            0.025,
            (
                f"{SOURCE}: max_batches ends the pass at a standard error of 0.05 std, 0.025 std wanted "
                "(largest for the variance of channel 0 in b); 4,800 samples are enough"
            ),
        ),
        (
            pooling({"a": layer(None)}, batches=1),
            None,
            "from 1 batch, 100 samples: one batch is too few to estimate a standard error",
        ),
        (
            pooling({"a": layer(None)}, batches=2),
            None,
            "from 2 batches, 200 samples: the batches are too few to estimate a standard error",
        ),
        (
            pooling({**TWO, "c": layer(None), "d": layer(None)}),
            0.05,
            f"{SOURCE}: c and 1 other layer ran in too few batches to estimate a standard error",
        ),
        (
            pooling(TWO, order="the labels are sorted"),
            None,
            f"{SOURCE}: the labels are sorted, so that the standard error is not known",
        ),
    ],
)
def test_the_note_on_the_source(result, wanted, note):
    assert source_note(result, "population", wanted) == note


def test_the_estimator_decides_which_variance_counts():
    assert "largest for the mean of channel 0 in a" in source_note(pooling(TWO), "within-batch", 0.001)


@pytest.mark.parametrize(
    ("result", "wanted", "warning"),
    [
        (pooling(TWO), None, None),
        (pooling(TWO, End.REACHED), 0.05, None),
        (pooling(TWO, End.LIMIT), 0.01, None),
        (
            pooling(TWO),
            0.01,
            (
                f"{RULE}, got 0.05 after 12 "
                "batches, all that there are. Pass 30,000 samples, or leave standard_error out: the statistics of all "
                "batches are stored."
            ),
        ),
        (
            pooling(TWO, order="the labels are sorted"),
            0.01,
            (
                f"{RULE}, got none after 12 "
                "batches: the labels are sorted, so that the standard error is not known. Shuffle them, or leave "
                "standard_error out: the statistics of all batches are stored."
            ),
        ),
        (
            pooling({"a": layer(None)}, batches=1),
            0.01,
            (
                f"{RULE}, got none after 1 batch: "
                "one batch is too few to estimate a standard error. Pass more data, or leave standard_error out: the "
                "statistics of all batches are stored."
            ),
        ),
    ],
)
def test_the_warning_where_the_data_end_first(result, wanted, warning):
    assert why_not_reached(result, "population", wanted) == warning


def test_the_note_on_passes():
    assert passes_note(pooling(TWO)) is None
    assert passes_note(pooling({"a": layer(None)})) is None
    layers = {"a": pooled(0.1, batches=8), "b": pooled(0.1, batches=1200)}
    assert passes_note(pooling(layers)) == "one pass for each layer, over 8 to 1,200 batches"
