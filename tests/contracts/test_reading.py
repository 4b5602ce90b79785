"""How often the data of the caller are read, counted in iterations over them: they may come from a slow disk."""

import warnings

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import BnlabWarning, UsageError
from bnlab.observe.passes import subject


class Counted:
    """Batches that count how often they are begun, and that may hide their length."""

    def __init__(self, batches, sized=True):
        self.batches, self.sized, self.iterations, self.read = batches, sized, 0, 0

    def __iter__(self):
        self.iterations += 1
        for batch in self.batches:
            self.read += 1
            yield batch

    def __len__(self):
        if not self.sized:
            raise TypeError("a stream has no length")
        return len(self.batches)


def batches(count, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def network():
    """Return a network whose statistics are stale in both layers."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    for layer in (model[1], model[4]):
        layer.running_mean += 3
    return model


def accuracy(model, data):
    hits = total = 0
    for x, y in data:
        hits, total = hits + int((model(x).argmax(1) == y).sum()), total + len(y)
    return hits / total


@pytest.fixture
def snapshots(monkeypatch):
    """Count the snapshots that are taken."""
    taken = []
    begin = subject.Subject.__init__
    monkeypatch.setattr(subject.Subject, "__init__", lambda self, model: (taken.append(model), begin(self, model))[1])
    return taken


@pytest.mark.parametrize("max_batches", ["auto", None, 5])
@pytest.mark.parametrize(("metric", "most"), [(None, 3), (accuracy, 6)])
@pytest.mark.parametrize("count", [6, 70])
def test_check_reads_data_a_few_times_and_snapshots_the_model_once(count, metric, most, max_batches, snapshots):
    data, train_data = Counted(batches(count)), Counted(batches(count, seed=1))
    bnlab.check(network(), data=data, train_data=train_data, metric=metric, max_batches=max_batches)
    assert 1 <= data.iterations <= most
    assert 1 <= train_data.iterations <= most
    if max_batches is not None:
        assert data.iterations == train_data.iterations == 1
    assert len(snapshots) == 1


@pytest.mark.parametrize("max_batches", ["auto", None])
@pytest.mark.parametrize("count", [6, 70])
def test_repair_reads_data_a_few_times(count, max_batches, snapshots):
    data, train_data = Counted(batches(count)), Counted(batches(count, seed=1))
    receipt = bnlab.repair(network(), data=data, train_data=train_data, metric=accuracy, max_batches=max_batches)
    assert receipt.changes.changes
    assert data.iterations <= 12
    assert train_data.iterations <= 12
    if max_batches == "auto":
        assert data.iterations == train_data.iterations == 1
    assert len(snapshots) <= 6


def test_the_sample_of_long_data_is_spread_and_the_report_says_so():
    data = Counted(batches(1563, size=4))
    diagnosis = bnlab.check(network(), data=data)
    assert "data: from 64 of 1,563 batches" in diagnosis.notes
    assert data.read <= 1563
    assert not bnlab.check(network(), data=Counted(batches(64, size=4))).notes


def test_the_first_batches_of_a_stream_are_used_with_a_warning():
    with pytest.warns(BnlabWarning, match=r"data: it must know its length .* the first 64 are used"):
        diagnosis = bnlab.check(network(), data=Counted(batches(70, size=4), sized=False))
    assert "data: from the first 64 batches" in diagnosis.notes


def test_a_short_stream_is_used_whole_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bnlab.check(network(), data=Counted(batches(6), sized=False)).notes


def test_statistics_of_all_batches_are_those_of_all():
    """A shift that only every other batch has, which a wrong spread would miss, reaches the mean."""
    data = [(x + 100 * (index % 2),) for index, (x, _) in enumerate(batches(128))]
    model = nn.Sequential(nn.BatchNorm1d(4))
    layer = bnlab.check(model, data=data, max_batches=None, per_channel=True).layers[0]
    expected = torch.cat([x for (x,) in data]).double().mean(0)
    assert torch.allclose(torch.tensor(layer.per_channel["data_mean"], dtype=torch.float64), expected, atol=1e-4)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
def test_a_wrong_number_of_batches_is_refused(value):
    with pytest.raises(UsageError, match="max_batches: value must be 'auto', None or a number of at least 1"):
        bnlab.check(network(), data=batches(2), max_batches=value)


def test_data_that_raise_end_in_a_line():
    def broken():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(UsageError, match="data: it must yield batches, got OSError: the disk is gone"):
        bnlab.check(network(), data=Loader())


def test_progress_is_shown_only_where_somebody_looks(capsys):
    bnlab.check(network(), data=batches(3))
    assert capsys.readouterr().err == ""
    bnlab.check(network(), data=batches(3), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    bnlab.check(network(), data=batches(3), progress=False)
    assert capsys.readouterr().err == ""
