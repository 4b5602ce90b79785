import pytest
import torch
from torch import nn

import bnlab
from bnlab.watching.forward_passes import ForwardPasses
from bnlab.watching.watched_layer import WatchedLayer


def watched_of(layer, sample=lambda *_: None):
    watched = WatchedLayer("bn", layer, ForwardPasses(lambda _: None), sample)
    watched.install()
    return watched


def close(watched, **changes):
    settings = {"skipped": False, "trained_by": None, "is_frozen": False, **changes}
    watched.close(watched.take(), **settings)
    return watched.evidence.steps[-1]


@pytest.mark.parametrize(
    ("layer", "updates"),
    [
        (nn.BatchNorm1d(3), 1),
        (nn.BatchNorm1d(3).eval(), 0),
        (nn.BatchNorm1d(3, momentum=0.0), 0),
        (nn.BatchNorm1d(3, momentum=None), 1),
        (nn.BatchNorm1d(3, track_running_stats=False), 0),
        (bnlab.nn.BatchNorm1d(3), 1),
        (bnlab.nn.FrozenBatchNorm1d(3), 0),
    ],
)
def test_whether_a_forward_pass_updates_the_statistics(layer, updates):
    watched = watched_of(layer)
    before = None if layer.running_mean is None else layer.running_mean.clone()
    layer(torch.randn(16, 3, requires_grad=True)).sum().backward()
    step = close(watched)
    assert step.updates == updates
    if before is not None:
        assert torch.equal(before, layer.running_mean) == (updates == 0)


@pytest.mark.parametrize(("training", "updates"), [(False, 0), (True, 100)])
def test_a_long_validation_takes_no_memory(training, updates):
    layer = nn.BatchNorm1d(3).train(training)
    watched = watched_of(layer)
    with torch.no_grad():
        for _ in range(100):
            layer(torch.randn(16, 3))
    assert len(watched.take()) == (1 if updates else 0)
    with torch.no_grad():
        for _ in range(100):
            layer(torch.randn(16, 3))
    assert close(watched).without_gradients == updates


def test_what_a_new_and_an_old_layer_are():
    old = nn.BatchNorm1d(3)
    old(torch.randn(8, 3))
    assert watched_of(nn.BatchNorm1d(3)).evidence.is_fresh
    assert not watched_of(old).evidence.is_fresh
    assert watched_of(nn.SyncBatchNorm(3)).evidence.reads_other_ranks
    assert watched_of(bnlab.nn.BatchRenorm1d(3)).evidence.reads_other_ranks
    assert not watched_of(nn.BatchNorm1d(3, affine=False)).evidence.has_affine


def test_another_momentum_without_gradients_means_that_somebody_estimates_the_statistics_anew():
    layer = nn.BatchNorm1d(3)
    watched = watched_of(layer)
    layer.momentum = None
    with torch.no_grad():
        layer(torch.randn(16, 3))
    layer.momentum = 0.1
    with torch.no_grad():
        layer(torch.randn(16, 3))
    assert close(watched).without_gradients == 1


def test_the_counts_of_a_step_are_those_of_its_largest_batch():
    layer = nn.BatchNorm2d(3)
    watched = watched_of(layer)
    for size in (4, 2):
        layer(torch.randn(size, 3, 5, 5)).sum().backward()
    assert close(watched).count == 100
    assert close(watched).count == 0


def test_one_forward_pass_of_a_sampled_step_is_sampled():
    taken = []
    layer = nn.BatchNorm1d(3)
    watched = watched_of(layer, lambda own, x: taken.append((own, x)))
    layer(torch.randn(8, 3))
    watched.is_sampled = True
    with torch.no_grad():
        layer(torch.randn(8, 3))
    x = torch.randn(8, 3)
    layer(x)
    layer(torch.randn(8, 3))
    assert len(taken) == 1
    assert taken[0] == (watched, x)


def test_batches_that_were_kept_out_are_counted_from_their_first_step_on():
    watched = watched_of(nn.BatchNorm1d(3))
    watched.keep_out(0, 3)
    watched.keep_out(2, 4)
    watched.keep_out(1, 5)
    assert (watched.evidence.kept_out_step, watched.evidence.kept_out) == (4, 3)
