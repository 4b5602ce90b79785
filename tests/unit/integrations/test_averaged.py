import copy

import pytest
import torch
from tests.unit.integrations.networks import batches, network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bnlab.errors import UsageError
from bnlab.integrations.averaged import copy_counters, copy_statistics, inside_average, require_averaged_buffers


def averaged_after(steps, model, **options):
    """Return an average of a model that takes some forward passes."""
    average = AveragedModel(model, use_buffers=True, **options)
    means = []
    for index in range(steps):
        model(batches()[index % 4] + index)
        average.update_parameters(model)
        means.append(model[1].running_mean.double())
    return average, means


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({}, 1), ({"avg_fn": get_ema_avg_fn(0.9)}, 10), ({"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, 10)],
    ids=["SWA", "EMA", "EMA of all at once"],
)
def test_the_counter_of_an_average_is_mended_and_its_statistics_stay(options, wrong):
    model = network()
    average, means = averaged_after(20, model, **options)
    assert average.module[1].num_batches_tracked == wrong  # torch averages integers
    copy_counters(average, model)
    assert average.module[1].num_batches_tracked == 20
    assert average.module[4].num_batches_tracked == 20
    expected = torch.stack(means).mean(0)
    if options:
        expected = means[0]
        for mean in means[1:]:
            expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(average.module[1].running_mean.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_copies_are_those_of_the_model_that_trains():
    model = network()
    average, _ = averaged_after(5, model)
    weight = average.module[1].weight.clone()
    copy_statistics(average, model)
    for copied, source in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(copied, source)
        assert copied.data_ptr() != source.data_ptr()
    assert torch.equal(average.module[1].weight, weight)


def test_an_average_of_copied_buffers_is_none_of_averaged_ones():
    model = network()
    require_averaged_buffers(AveragedModel(model, use_buffers=True))
    require_averaged_buffers(copy.deepcopy(model))  # an average of another library
    with pytest.raises(UsageError, match=r"^averaged: model must average its buffers .* Pass use_buffers=True"):
        require_averaged_buffers(AveragedModel(model))


def test_a_model_with_other_layers_is_refused():
    with pytest.raises(UsageError, match=r"^averaged: model must have the layers .* got '4' in one"):
        copy_statistics(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), network())
    other = network()
    other[4] = nn.BatchNorm1d(5)
    with pytest.raises(UsageError, match=r"^averaged: 4 must have 3 channels, got 5[.]"):
        copy_statistics(other, network())


def test_the_model_inside_wrappers():
    model = network()
    average = AveragedModel(nn.DataParallel(model))
    assert inside_average(average) is average.module.module
    assert inside_average(model) is model
