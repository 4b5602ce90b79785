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


def network(device):
    """Return a network whose statistics are stale in both layers."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    for layer in (model[1], model[4]):
        layer.running_mean += 3
    return model.to(device)


def right_answers(model, x, y):
    """Return how many there are. A metric of one's own moves its batches by itself."""
    device = next(model.parameters()).device
    return int((model(x.to(device)).argmax(1) == y.to(device)).sum())


def accuracy(model, data):
    hits = total = 0
    for x, y in data:
        hits, total = hits + right_answers(model, x, y), total + len(y)
    return hits / total


def centred(model, data):
    """Return a metric that is better for the statistics of the data, and that reads the data."""
    list(data)
    mean = model[1].running_mean
    return 0.0 if mean is None else -float(mean.abs().mean())


@pytest.fixture
def snapshots(monkeypatch):
    """Count the snapshots that are taken."""
    taken = []
    begin = subject.Subject.__init__
    monkeypatch.setattr(subject.Subject, "__init__", lambda self, *args: (taken.append(args), begin(self, *args))[1])
    return taken


@pytest.mark.parametrize("max_batches", ["auto", None, 5])
@pytest.mark.parametrize(("metric", "max_iterations"), [(None, 3), (accuracy, 6)])
@pytest.mark.parametrize("count", [6, 70])
def test_check_reads_data_a_few_times_and_snapshots_the_model_once(
    count, metric, max_iterations, max_batches, snapshots, device
):
    data, train_data = Counted(batches(count)), Counted(batches(count, seed=1))
    bnlab.check(network(device), data=data, train_data=train_data, metric=metric, max_batches=max_batches)
    assert 1 <= data.iterations <= max_iterations
    assert 1 <= train_data.iterations <= max_iterations
    if max_batches is not None:
        assert data.iterations == train_data.iterations == 1
    assert len(snapshots) == 1


@pytest.mark.parametrize("max_batches", ["auto", None])
@pytest.mark.parametrize("count", [6, 70])
def test_repair_reads_data_a_few_times(count, max_batches, snapshots, device):
    torch.manual_seed(1)  # the labels are random, so that for some weights the accuracy gets worse by chance
    data, train_data = Counted(batches(count)), Counted(batches(count, seed=1))
    receipt = bnlab.repair(network(device), data=data, train_data=train_data, metric=centred, max_batches=max_batches)
    assert receipt.changes.changes
    assert data.iterations <= 12
    assert train_data.iterations <= 12
    if max_batches == "auto":
        assert data.iterations == train_data.iterations == 1
    assert len(snapshots) <= 6


def test_the_sample_of_long_data_is_spread_and_the_report_says_so(device):
    data = Counted(batches(1563, size=4))
    diagnosis = bnlab.check(network(device), data=data)
    assert "data: from 64 of 1,563 batches" in diagnosis.notes
    assert data.read <= 1563
    assert not bnlab.check(network(device), data=Counted(batches(64, size=4))).notes


def test_the_first_batches_of_a_stream_are_used_with_a_warning(device):
    with pytest.warns(BnlabWarning, match=r"data: it must have a length .* the first 64 are used"):
        diagnosis = bnlab.check(network(device), data=Counted(batches(70, size=4), sized=False))
    assert "data: from the first 64 batches" in diagnosis.notes


def test_a_short_stream_is_used_whole_without_a_warning(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bnlab.check(network(device), data=Counted(batches(6), sized=False)).notes


def test_statistics_of_all_batches_are_those_of_all(device):
    """A shift that only every other batch has, which a wrong spread would miss, reaches the mean."""
    data = [(x + 100 * (index % 2),) for index, (x, _) in enumerate(batches(128))]
    model = nn.Sequential(nn.BatchNorm1d(4)).to(device)
    layer = bnlab.check(model, data=data, max_batches=None, per_channel=True).layers[0]
    expected = torch.cat([x for (x,) in data]).double().mean(0)
    assert torch.allclose(torch.tensor(layer.per_channel["data_mean"], dtype=torch.float64), expected, atol=1e-4)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "all"])
def test_a_wrong_number_of_batches_is_refused(value, device):
    with pytest.raises(UsageError, match="max_batches: value must be 'auto', None or a number of at least 1"):
        bnlab.check(network(device), data=batches(2), max_batches=value)


def test_data_that_raise_end_in_a_line(device):
    def broken():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(UsageError, match="data: it must yield batches, got OSError: the disk is gone"):
        bnlab.check(network(device), data=Loader())


def test_progress_is_shown_only_where_somebody_looks(capsys, device):
    bnlab.check(network(device), data=batches(3))
    assert capsys.readouterr().err == ""
    bnlab.check(network(device), data=batches(3), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    bnlab.check(network(device), data=batches(3), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_batches", ["auto", None, 10])
def test_a_metric_that_asks_for_the_data_set_gets_the_right_share(max_batches, device):
    """A metric may divide by the size of the data set, which a part of its batches does not have."""

    class Loader(Counted):
        dataset = range(70 * 16)

    def share(model, data):
        return sum(right_answers(model, x, y) for x, y in data) / len(data.dataset)

    model, loader = network(device), Loader(batches(70))
    numbers = bnlab.check(model, data=loader, metric=share, max_batches=max_batches).numbers
    with torch.no_grad():
        assert numbers.eval_running == pytest.approx(accuracy(model.eval(), loader.batches))
    assert loader.iterations <= 6


def test_a_metric_may_change_its_batches_and_a_model_its_inputs(device):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.bn(x.sub_(1).div_(2)))

    def popping(model, data):
        hits = total = 0
        for batch in data:
            y = batch.pop("y")
            hits, total = hits + right_answers(model, batch.pop("x").mul_(2), y), total + len(y)
        return hits / total

    class Fresh:
        """Data that are read anew each time, as from a disk."""

        def __init__(self, make):
            self.make = make

        def __iter__(self):
            return (self.make(x.clone(), y) for x, y in batches(4))

    torch.manual_seed(0)
    model = InPlace().to(device).eval()
    numbers = bnlab.check(model, data=Fresh(lambda x, y: (x, y)), metric=accuracy).numbers
    with torch.no_grad():
        assert numbers.eval_running == accuracy(model, Fresh(lambda x, y: (x, y)))

    class Keywords(InPlace):
        def forward(self, x, y=None):
            return super().forward(x)

    torch.manual_seed(0)
    model = Keywords().to(device).eval()
    as_dicts = Fresh(lambda x, y: {"x": x, "y": y})
    numbers = bnlab.check(model, data=as_dicts, metric=popping).numbers
    with torch.no_grad():
        assert numbers.eval_running == popping(model, as_dicts)


def test_repair_leaves_the_random_numbers_alone(device):
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=16, shuffle=True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bnlab.repair(nn.Sequential(nn.BatchNorm1d(4)).to(device), data=loader)
    assert torch.equal(torch.rand(1), expected)


def test_a_model_that_changes_its_weights_in_train_mode_keeps_them(device):
    class Clipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn, self.steps = nn.Linear(4, 4), nn.BatchNorm1d(4), []

        def forward(self, x):
            if self.training:
                self.steps.append(1)
                with torch.no_grad():
                    self.linear.weight.mul_(0.9)
            return self.bn(self.linear(x))

    model = Clipping().to(device)
    before = model.linear.weight.detach().clone()
    bnlab.check(model, data=[(x,) for x, _ in batches(3)])
    assert torch.equal(model.linear.weight, before)
    assert model.steps == []


def test_a_scripted_model_is_checked_by_its_numbers(device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what many models are still stored as
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4)).to(device))
    assert bnlab.check(scripted).summary.layers == 1


def test_a_model_that_rejects_nan_behind_a_layer_is_recalibrated_without_the_batch(device):
    class Rejecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.first(x)
            if h.isnan().any():
                raise ValueError("NaN")
            return self.second(h)

    spoiled = torch.full((8, 4), float("nan"))
    receipt = bnlab.recalibrate(Rejecting().to(device), [spoiled, *(x for x, _ in batches(3))])
    assert "left out: 1 batch in which a layer gets a NaN or inf" in receipt.changes.notes


def share_of_the_data_set(model, data):
    return sum(right_answers(model, x, y) for x, y in data) / len(data.dataset)


@pytest.mark.parametrize("max_batches", ["auto", None])
@pytest.mark.parametrize("metric", [accuracy, share_of_the_data_set])
def test_the_layers_that_cost_the_metric_are_looked_for_without_reading_again(metric, max_batches, device):
    """Eight stale layers, replaced one after the other, would each read long data once more."""

    class Loader(Counted):
        dataset = range(70 * 16)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8))
    for _ in range(8):
        model.extend([nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)])
    model.append(nn.Linear(8, 3)).to(device)
    inputs = [x for x, _ in batches(70)]
    with torch.no_grad():
        for x in inputs:
            model(x.to(device))
        model.eval()
        loader = Loader([(x, model(x.to(device)).argmax(1).cpu()) for x in inputs])
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean += torch.randn(8).to(device)
    numbers = bnlab.check(model, data=loader, metric=metric, max_batches=max_batches).numbers
    assert numbers.eval_recalibrated > numbers.eval_running + 0.5
    assert loader.iterations <= 6
