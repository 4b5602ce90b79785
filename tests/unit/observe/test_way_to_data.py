"""Statistics of the evaluation data are recognised, and other changes are not."""

import numpy as np
import pytest

from bnlab.checks.cases import healthy, model_layer, observed
from bnlab.observe.way_to_data import way_to_data

TRAIN_MEAN, TRAIN_VAR = np.array([0.3, -0.7, 0.1, 1.2]), np.array([0.8, 2.0, 0.4, 1.1])
DATA_MEAN, DATA_VAR = np.array([1.3, -0.1, 0.9, 0.4]), np.array([1.6, 1.0, 0.6, 2.0])
OTHER_MEAN, OTHER_VAR = np.array([0.3, 2.4, 0.1, 3.2]), np.array([0.1, 9.0, 4.0, 1.1])


def layer(mean, var, *, data=(DATA_MEAN, DATA_VAR), train=(TRAIN_MEAN, TRAIN_VAR), name="bn"):
    return model_layer(
        name,
        state=healthy(name, running_mean=mean, running_var=var),
        data=observed(mean=data[0], var=data[1]),
        train_data=observed(mean=train[0], var=train[1]),
    )


def geometric(share):
    """Return variances whose logarithms are a share of the way from those of the training data."""
    return TRAIN_VAR ** (1 - share) * DATA_VAR**share


def test_buffers_with_the_statistics_of_the_data_are_all_the_way():
    assert way_to_data([layer(DATA_MEAN, DATA_VAR)]) == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9, 1.0, 1.2, 1.45])
def test_a_share_of_the_way_is_measured(share):
    mean = (1 - share) * TRAIN_MEAN + share * DATA_MEAN
    assert way_to_data([layer(mean, geometric(share))]) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("updates", [10, 20, 44])
def test_a_moving_average_over_the_data_is_between_half_and_all_of_the_way(updates):
    """Some updates at momentum 0.1 in train mode leave the weight 0.9^k to the statistics of the training data."""
    share = 1 - 0.9**updates
    way = way_to_data([layer((1 - share) * TRAIN_MEAN + share * DATA_MEAN, (1 - share) * TRAIN_VAR + share * DATA_VAR)])
    assert way == pytest.approx(share, abs=0.1)
    assert 0.5 < way < 1.05


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.45])
def test_less_than_half_of_the_way_is_not_reported(share):
    assert way_to_data([layer((1 - share) * TRAIN_MEAN + share * DATA_MEAN, geometric(share))]) is None


@pytest.mark.parametrize("share", [1.55, 2.0, 5.0])
def test_statistics_far_behind_the_data_are_not_those_of_the_data(share):
    assert way_to_data([layer((1 - share) * TRAIN_MEAN + share * DATA_MEAN, geometric(share))]) is None


@pytest.mark.parametrize(
    ("mean", "var"),
    [
        (OTHER_MEAN, OTHER_VAR),
        (np.zeros(4), np.ones(4)),
        (TRAIN_MEAN, 20 * TRAIN_VAR),
        (2 * TRAIN_MEAN - DATA_MEAN, TRAIN_VAR**2 / DATA_VAR),
    ],
)
def test_a_change_in_another_direction_is_plain_staleness(mean, var):
    assert way_to_data([layer(mean, var)]) is None


def test_data_sets_that_are_alike_show_no_way():
    """The data are 0.02 standard deviations from the training data, and the buffers hold exactly their statistics."""
    near = (TRAIN_MEAN + 0.02 * np.sqrt(TRAIN_VAR), TRAIN_VAR)
    far = (TRAIN_MEAN + 0.2 * np.sqrt(TRAIN_VAR), TRAIN_VAR)
    assert way_to_data([layer(*near, data=near)]) is None
    assert way_to_data([layer(*far, data=far)]) == pytest.approx(1.0)
    assert way_to_data([layer(TRAIN_MEAN, TRAIN_VAR, data=(TRAIN_MEAN, TRAIN_VAR))]) is None


def test_the_way_is_that_of_all_layers_together():
    whole, none = layer(DATA_MEAN, DATA_VAR, name="a"), layer(OTHER_MEAN, OTHER_VAR, name="b")
    assert way_to_data([whole, layer(DATA_MEAN, DATA_VAR, name="b")]) == pytest.approx(1.0)
    assert way_to_data([whole, none]) is None


def test_the_least_squares_are_those_of_numpy():
    """Noise on the way: the share is the slope that numpy.linalg.lstsq returns."""
    rng = np.random.default_rng(0)
    mean, var = DATA_MEAN + 0.05 * rng.normal(size=4), DATA_VAR * np.exp(0.05 * rng.normal(size=4))
    spread = TRAIN_VAR + 1e-5

    def differences(means, variances):
        return np.concatenate([(means - TRAIN_MEAN) / np.sqrt(spread), np.log((variances + 1e-5) / spread) / 2])

    slope = np.linalg.lstsq(differences(DATA_MEAN, DATA_VAR)[:, None], differences(mean, var), rcond=None)[0][0]
    assert slope != pytest.approx(1.0, abs=1e-3)
    assert way_to_data([layer(mean, var)]) == pytest.approx(slope)


def test_channels_that_are_not_numbers_are_left_out():
    mean, var = DATA_MEAN.copy(), DATA_VAR.copy()
    mean[1], var[2] = np.nan, -1.0
    assert way_to_data([layer(mean, var)]) == pytest.approx(1.0)
    assert way_to_data([layer(np.full(4, np.nan), np.full(4, np.nan))]) is None


@pytest.mark.parametrize("part", ["state", "data", "train_data"])
def test_a_layer_without_a_part_of_the_evidence_is_left_out(part):
    other = layer(OTHER_MEAN, OTHER_VAR, name="other")
    lacking = model_layer("other", **{"state": other.state, "data": other.data, part: None})
    assert way_to_data([lacking]) is None
    assert way_to_data([lacking, layer(DATA_MEAN, DATA_VAR)]) == pytest.approx(1.0)
    assert way_to_data([]) is None
