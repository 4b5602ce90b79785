import torch
from tests.unit.integrations.networks import batches, is_equal, network, state
from torch import nn

from bnlab.integrations.kept_statistics import KeptStatistics


def test_every_bit_is_written_back_in_place():
    model = network()
    model(batches()[0])
    before, places = state(model), [buffer.data_ptr() for buffer in model.buffers()]
    kept = KeptStatistics(model)
    model(batches()[1])
    assert not is_equal(state(model), before)
    kept.restore()
    assert is_equal(state(model), before)
    assert [buffer.data_ptr() for buffer in model.buffers()] == places


def test_other_tensors_in_their_place_are_written_too():
    model = network()
    kept, before = KeptStatistics(model), state(model)
    with torch.inference_mode():
        model[1].running_mean = model[1].running_mean + 1
    model[1].running_var = model[1].running_var + 1
    kept.restore()
    assert is_equal(state(model), before)
    model(batches()[0])  # an inference tensor could not change here


def test_a_layer_without_statistics_has_nothing_to_keep():
    KeptStatistics(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))).restore()
