"""Counters after a recalibration say that the statistics have settled, and can be put back."""

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.checks.bn105_statistics_barely_updated import StatisticsBarelyUpdated
from bnlab.errors import UsageError
from bnlab.remedies.counters import new_counters, settled_count, write_counters


def layer(momentum=0.1, count=0):
    module = nn.BatchNorm1d(2, momentum=momentum)
    module.num_batches_tracked.fill_(count)
    return module


def counts(layers):
    return [int(module.num_batches_tracked) for module in layers.values()]


MOMENTA = [*(np.arange(1, 100) / 100).tolist(), 0.5, 1e-3, 1e-4, 1e-5, 0.999, *np.random.default_rng(0).random(200)]


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_count_is_the_first_that_forgets_the_initial_values(momentum, device):
    count = settled_count([layer(float(momentum)).to(device)])
    assert isinstance(count, int)
    assert (1 - momentum) ** count <= 0.01
    assert count == 1 or (1 - momentum) ** (count - 1) > 0.01


@pytest.mark.parametrize(("momentum", "count"), [(0.1, 44), (0.01, 459), (0.001, 4603), (0.5, 7), (0.9, 2), (0.99, 1)])
def test_the_counts_of_usual_momenta(momentum, count, device):
    """44 is ceil(ln 0.01 / ln 0.9) = ceil(43.7), and so on."""
    assert settled_count([layer(momentum).to(device)]) == pytest.approx(count, abs=momentum == 0.99)


def test_the_weight_is_the_limit_of_the_check():
    assert StatisticsBarelyUpdated().limits.initial_weight == 0.01


@pytest.mark.parametrize(("momentum", "count"), [(None, 0), (1.0, 1), (1.5, 1), (0.0, 0)])
def test_momenta_without_a_decay(momentum, count, device):
    assert settled_count([layer(momentum).to(device)]) == count


def test_the_slowest_layer_counts(device):
    assert (
        settled_count(
            [
                layer(0.5).to(device),
                layer(0.1).to(device),
                layer(None).to(device),
                layer(1.0).to(device),
                layer(0.0).to(device),
            ]
        )
        == 44
    )
    assert settled_count([]) == 0


def test_a_momentum_that_settles_never_has_a_limit(device):
    assert settled_count([layer(1e-30).to(device)]) == 10**9
    narrow = layer(1e-3).to(device)
    narrow.num_batches_tracked = torch.tensor(5, dtype=torch.int8).to(device)
    assert new_counters({"a": narrow}, {"a"}, 7) == {"a": 127}


def rewritten(layers, recalibrated=None, batches=7):
    """Write the counters as after a recalibration of some layers, or of all."""
    return write_counters(
        layers, new_counters(layers, layers.keys() if recalibrated is None else recalibrated, batches)
    )


@pytest.mark.parametrize(
    ("old", "recalibrated", "new"),
    [([0, 0], "01", 44), ([3, 90], "01", 90), ([100, 7], "1", 100), ([44, 0], "0", 44), ([0], "0", 44)],
)
def test_all_counters_become_the_largest_and_undo_restores_them(old, recalibrated, new, device):
    layers = {str(index): layer(count=value).to(device) for index, value in enumerate(old)}
    places = [module.num_batches_tracked.data_ptr() for module in layers.values()]
    written = rewritten(layers, set(recalibrated))
    assert counts(layers) == [new] * len(old)
    assert written.changes == {str(index): (value, new) for index, value in enumerate(old) if value != new}
    written.require_unchanged()
    written.restore()
    assert counts(layers) == old
    assert [module.num_batches_tracked.data_ptr() for module in layers.values()] == places
    assert all(module.num_batches_tracked.dtype is torch.int64 for module in layers.values())


def test_a_cumulative_average_gets_the_number_of_batches_if_it_was_recalibrated(device):
    layers = {"moving": layer(0.1, 5).to(device), "cumulative": layer(None, 500).to(device)}
    rewritten(layers, {"moving", "cumulative"})
    assert counts(layers) == [44, 7]
    layers = {"moving": layer(0.001, 5).to(device), "cumulative": layer(None, 500).to(device)}
    rewritten(layers, {"moving"})
    assert counts(layers) == [4603, 500]


@pytest.mark.parametrize("value", [44, 1000])
def test_nothing_changes_where_all_are_large_and_equal(value, device):
    layers = {"a": layer(count=value).to(device), "b": layer(count=value).to(device)}
    versions = [module.num_batches_tracked._version for module in layers.values()]
    written = rewritten(layers)
    assert (counts(layers), written.changes) == ([value, value], {})
    assert [module.num_batches_tracked._version for module in layers.values()] == versions
    layers["a"].num_batches_tracked.add_(1)
    written.require_unchanged()
    written.restore()
    assert counts(layers) == [value + 1, value]


def test_a_later_change_is_refused(device):
    layers = {"net.a": layer(count=3).to(device), "net.b": layer(count=90).to(device)}
    written = rewritten(layers)
    layers["net.b"].num_batches_tracked.add_(1)
    written.require_unchanged()
    layers["net.a"].num_batches_tracked.add_(1)
    message = r"^undo: num_batches_tracked of net\.a must still be 90, got 91\. Undo the later changes first\.$"
    with pytest.raises(UsageError, match=message):
        written.require_unchanged()
    assert counts(layers) == [91, 91]
    layers["net.a"].num_batches_tracked.sub_(1)
    written.require_unchanged()


def test_a_counter_that_was_replaced_is_restored_where_the_layer_has_it(device):
    layers = {"a": layer(count=3).to(device)}
    written = rewritten(layers)
    layers["a"]._apply(torch.clone)
    written.require_unchanged()
    written.restore()
    assert counts(layers) == [3]
    layers["a"].num_batches_tracked = None
    with pytest.raises(UsageError, match="num_batches_tracked of a must still be 44, got none"):
        written.require_unchanged()


def test_a_model_that_is_itself_the_layer_has_a_name(device):
    module = layer().to(device)
    written = rewritten({"": module})
    module.num_batches_tracked.zero_()
    with pytest.raises(UsageError, match="num_batches_tracked of the model must still be 44, got 0"):
        written.require_unchanged()


def test_a_layer_without_a_counter_is_left_alone(device):
    without = nn.BatchNorm1d(2, track_running_stats=False).to(device)
    layers = {"a": without, "b": layer().to(device)}
    written = rewritten(layers)
    assert without.num_batches_tracked is None
    assert written.changes == {"b": (0, 44)}
    assert rewritten({"a": without}).changes == {}
    assert rewritten({}).changes == {}


def test_counters_are_written_without_a_gradient(device):
    with torch.enable_grad():
        written = rewritten({"a": layer().to(device)})
        written.restore()
    assert torch.is_grad_enabled()
