"""Losses are measured sample by sample, and compared in pairs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.losses import (
    Difference,
    Losses,
    cross_entropy_measure,
    loss_measure,
    mean_loss,
    score_measure,
)
from bnlab.observe.metric import Score


def losses(values, weights=None):
    values = np.asarray(values, dtype=np.float64)
    return Losses(values, np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64))


def log_softmax(scores):
    """Return the logarithm of the softmax over the second dimension, in float64 numpy."""
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def classified(count=3, size=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, classes, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(count)
    ]


def square(model, batch):
    return (model(batch) ** 2).mean()


def test_the_mean_weighs_every_sample_alike():
    assert losses([1.0, 4.0], [3, 1]).mean == pytest.approx(1.75)
    assert losses([1.0, 4.0]).mean == pytest.approx(2.5)


def test_joined_losses_follow_each_other():
    both = losses([1.0, 2.0], [3, 1]).joined(losses([5.0], [2]))
    assert both.values.tolist() == [1.0, 2.0, 5.0]
    assert both.weights.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_difference_is_that_of_paired_differences(seed):
    rng = np.random.default_rng(seed)
    common = 10 * rng.normal(size=50)
    left, right = losses(common + rng.normal(size=50)), losses(common)
    differences = left.values - right.values
    result = left.above(right)
    assert result.mean == pytest.approx(differences.mean())
    assert result.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(50))
    unpaired = math.sqrt((left.values.var(ddof=1) + right.values.var(ddof=1)) / 50)
    assert result.standard_error < unpaired / 5


def test_weights_count_the_samples_of_a_part():
    """By hand: the mean is (3*1 + 1*5)/4 = 2, and the squares are 9*1 + 1*9 = 18, times 2/1, under a root, over 4."""
    result = losses([1.0, 5.0], [3, 1]).above(losses([0.0, 0.0], [3, 1]))
    assert result.mean == pytest.approx(2.0)
    assert result.standard_error == pytest.approx(math.sqrt(36) / 4)


@pytest.mark.parametrize("scale", [1, 7, 1000])
def test_equal_weights_give_the_same_error_whatever_they_are(scale):
    values = [0.3, 0.1, 0.4, 0.1, 0.5]
    one = losses(values).above(losses([0.0] * 5))
    scaled = losses(values, [scale] * 5).above(losses([0.0] * 5, [scale] * 5))
    assert scaled.mean == pytest.approx(one.mean)
    assert scaled.standard_error == pytest.approx(one.standard_error)


def test_one_sample_alone_proves_nothing():
    difference = losses([5.0]).above(losses([1.0]))
    assert (difference.mean, difference.standard_error) == (4.0, math.inf)
    assert not difference.is_positive
    assert not difference.is_negative


@pytest.mark.parametrize(
    ("left", "right", "positive", "negative"),
    [
        ([math.nan, 1.0], [2.0, 1.0], True, False),
        ([math.inf, math.nan], [math.nan, 1.0], True, False),
        ([2.0, 1.0], [math.nan, 1.0], False, True),
        ([math.nan, 1.0], [math.nan, 2.0], False, False),
    ],
)
def test_a_loss_that_is_not_a_number_is_worse_than_any_number(left, right, positive, negative):
    difference = losses(left).above(losses(right))
    assert (difference.is_positive, difference.is_negative) == (positive, negative)
    assert difference.standard_error == pytest.approx(0.0 if positive or negative else math.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("mean", "positive", "negative"),
    [(0.21, True, False), (0.19, False, False), (0.0, False, False), (-0.19, False, False), (-0.21, False, True)],
)
def test_a_difference_counts_above_two_standard_errors(mean, positive, negative):
    difference = Difference(mean, 0.1)
    assert (difference.is_positive, difference.is_negative) == (positive, negative)


def test_equal_losses_do_not_differ():
    difference = losses([1.0, 2.0]).above(losses([1.0, 2.0]))
    assert difference == Difference(0.0, 0.0)
    assert not difference.is_positive
    assert not difference.is_negative


def test_the_cross_entropy_is_that_of_each_sample():
    model, data = nn.Identity(), classified()
    measure = cross_entropy_measure(model, data)
    result = measure.of(model, data)
    scores = np.concatenate([x.double().numpy() for x, _ in data])
    labels = np.concatenate([y.numpy() for _, y in data])
    expected = -log_softmax(scores)[np.arange(15), labels]
    assert measure.name == "cross-entropy"
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)
    assert result.weights.tolist() == [1.0] * 15
    assert not np.allclose(result.values, -log_softmax(scores.T).T[np.arange(15), labels])


def test_pixels_are_averaged_and_ignored_ones_add_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 2, 2, generator=generator)
    labels = torch.tensor([[[0, 1], [2, -100]], [[1, 1], [-100, -100]]])
    result = cross_entropy_measure(nn.Identity(), [(scores, labels)]).of(nn.Identity(), [(scores, labels)])
    logs = log_softmax(scores.double().numpy())
    expected = [
        -sum(logs[n, labels[n, i, j], i, j] for i in (0, 1) for j in (0, 1) if labels[n, i, j] >= 0) / 4 for n in (0, 1)
    ]
    np.testing.assert_allclose(result.values, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_the_loss(dtype):
    scores, labels = torch.tensor([[11.0, 0.0], [0.0, 0.0]], dtype=dtype), torch.tensor([0, 1])
    result = cross_entropy_measure(nn.Identity(), [(scores, labels)]).of(nn.Identity(), [(scores, labels)])
    np.testing.assert_allclose(result.values, [math.log1p(math.exp(-11)), math.log(2)], rtol=2e-3)


@pytest.mark.parametrize(
    "data",
    [
        [torch.zeros(4, 3)],
        [(torch.zeros(4, 3), torch.tensor([0.0, 1, 2, 0]))],
        [(torch.zeros(4, 3), torch.tensor([0, 1, 3, 4]))],
        [(torch.zeros(4, 3), torch.tensor([0, 1]))],
        [(torch.zeros(4, 3), {"labels": torch.tensor([0, 1, 2, 0])})],
        [],
    ],
)
def test_there_is_no_cross_entropy_without_labels_that_fit(data):
    assert cross_entropy_measure(nn.Identity(), data) is None


@pytest.mark.parametrize(
    "with_others",
    [(torch.zeros(4, 4),), (torch.zeros(4, 4), torch.zeros(4)), (torch.zeros(4, 4), torch.tensor([0, 1, 7, 8]))],
)
def test_a_later_batch_with_other_labels_is_an_error(with_others):
    data = [*classified(1), with_others]
    measure = cross_entropy_measure(nn.Identity(), data)
    with pytest.raises(UsageError, match="data: every batch must have labels like the first one"):
        measure.of(nn.Identity(), data)


@pytest.mark.parametrize(
    ("labels", "entropy"),
    [
        ([0, 1, 0, 1], math.log(2)),
        ([0, 0, 0, 1], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ([2, 2, 2, 2], 0.0),
        ([0, 1, 2, 5], math.log(4)),
    ],
)
def test_chance_is_the_entropy_of_the_labels(labels, entropy):
    data = [(torch.zeros(2, 6), torch.tensor(part)) for part in (labels[:2], labels[2:])]
    assert cross_entropy_measure(nn.Identity(), data).chance(data) == pytest.approx(entropy)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_the_best_constant_output_reaches_chance_where_labels_are_ignored(dtype):
    """The oracle is the loss of the constant output itself: the logarithms of the shares 3/4 and 1/4."""
    labels = torch.tensor([0, 0, 0, 1, -100, -100, -100, -100], dtype=dtype)
    data = [(torch.tensor([[0.75, 0.25]]).log().repeat(8, 1), labels)]
    measure = cross_entropy_measure(nn.Identity(), data)
    assert measure.chance(data) == pytest.approx(measure.of(nn.Identity(), data).mean)
    worse = [(torch.tensor([[0.6, 0.4]]).log().repeat(8, 1), labels)]
    assert measure.of(nn.Identity(), worse).mean > measure.chance(data)


def test_a_few_batches_are_cut_into_parts_and_many_are_not():
    x = torch.arange(64.0)[:, None]
    one = loss_measure(square, 1).of(nn.Identity(), [x])
    assert one.weights.tolist() == [4.0] * 16
    np.testing.assert_allclose(one.values, [(part.double() ** 2).mean() for part in x.split(4)])
    many = loss_measure(square, 16).of(nn.Identity(), list(x.split(4)))
    assert many.weights.tolist() == [4.0] * 16
    np.testing.assert_allclose(many.values, one.values)
    halves = loss_measure(square, 8).of(nn.Identity(), [x])
    assert halves.weights.tolist() == [32.0, 32.0]


def test_a_loss_whose_parts_fail_is_measured_on_whole_batches():
    def of_the_whole(model, batch):
        if len(batch) < 8:
            raise ValueError("eight samples at least")
        return square(model, batch)

    x = torch.arange(16.0)[:, None]
    result = loss_measure(of_the_whole, 2).of(nn.Identity(), list(x.split(8)))
    np.testing.assert_allclose(result.values, [(part.double() ** 2).mean() for part in x.split(8)])
    assert result.weights.tolist() == [8.0, 8.0]


def test_a_batch_that_cannot_be_cut_is_measured_once():
    batch = SimpleNamespace(x=torch.ones(64, 2))
    result = loss_measure(lambda model, batch: batch.x.mean(), 1).of(nn.Identity(), [batch])
    assert (result.values.tolist(), result.weights.tolist()) == ([1.0], [1.0])


def test_a_loss_is_measured_in_eval_mode_without_gradients():
    modes = []

    def loss(model, batch):
        modes.append((model.training, torch.is_grad_enabled()))
        return model(batch).mean()

    loss_measure(loss, 16).of(nn.Dropout(0.5).train(), [torch.ones(8, 2)])
    assert modes == [(False, False)]


def test_what_a_loss_raises_is_one_line():
    def broken(model, batch):
        raise RuntimeError("no\nlabels")

    with pytest.raises(
        UsageError, match=r"^loss: it must be a scalar of model and batch, got RuntimeError: no labels$"
    ):
        loss_measure(broken, 1).of(nn.Identity(), [torch.ones(8, 2)])
    with pytest.raises(
        UsageError, match=r"loss: it must be a scalar of model and batch, got (ValueError|RuntimeError)"
    ):
        loss_measure(lambda model, batch: model(batch), 1).of(nn.Identity(), [torch.ones(8, 2)])


def test_an_error_of_bnlab_in_a_loss_stays_as_it_is():
    def broken(model, batch):
        raise NoBatchNorm("none")

    with pytest.raises(NoBatchNorm, match=r"^none$"):
        loss_measure(broken, 1).of(nn.Identity(), [torch.ones(8, 2)])


@pytest.mark.parametrize("lower", [True, False])
def test_a_metric_becomes_a_loss_of_which_lower_is_better(lower):
    data = [torch.full((3, 1), 2.0), torch.full((1, 1), 6.0)]

    def metric(model, batches):
        return float(torch.cat(list(batches)).mean())

    measure = score_measure(Score(metric, lower_is_better=lower, name="height"))
    result = measure.of(nn.Identity(), data)
    sign = 1 if lower else -1
    assert measure.name == "height"
    assert measure.chance is None
    assert result.values.tolist() == [sign * 2.0, sign * 6.0]
    assert result.weights.tolist() == [3.0, 1.0]
    assert result.mean == sign * 3.0


def test_the_mean_loss_is_a_metric_of_which_lower_is_better():
    score = mean_loss(square)
    data = [torch.full((3, 1), 1.0), torch.full((1, 1), 3.0)]
    assert score.lower_is_better
    assert score.name == "loss"
    assert score.errors == 2
    assert Score(square).errors == 1
    assert score.on(nn.Identity(), data) == pytest.approx((3 * 1 + 1 * 9) / 4)
