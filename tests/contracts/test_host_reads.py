"""The host waits for a device as often for many batches as for few, and a recalibration for many layers as for few.

Tensors of the CPU stand for those of a device.
"""

import pytest
import torch
from tests.host_reads import as_on_a_device, host_reads
from torch import nn

import bnlab


def network(layers=2, kind=nn.BatchNorm2d):
    torch.manual_seed(0)
    blocks = [
        module
        for index in range(layers)
        for module in (nn.Conv2d(4 if index else 3, 4, 3, padding=1), kind(4), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(100, 3))


def batches(number):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 5, 5, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(number)
    ]


def reads_of(command, layers=2, number=3, kind=nn.BatchNorm2d):
    model, data = network(layers, kind), batches(number)
    with host_reads() as reads:
        command(model, data)
    return reads


RECALIBRATE = {
    "population": lambda model, data: bnlab.recalibrate(model, data),
    "within-batch": lambda model, data: bnlab.recalibrate(model, data, estimator="within-batch"),
    "number of batches": lambda model, data: bnlab.recalibrate(model, data, max_batches=len(data)),
}
COMMANDS = RECALIBRATE | {
    "layerwise": lambda model, data: bnlab.recalibrate(model, data, layerwise=True),
    "check": lambda model, data: bnlab.check(model, data=data, progress=False),
}


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, bnlab.nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("command", RECALIBRATE.values(), ids=RECALIBRATE)
def test_a_recalibration_reads_a_fixed_number_of_times(command, kind, monkeypatch):
    as_on_a_device(monkeypatch)
    few = reads_of(command, kind=kind)
    assert reads_of(command, number=9, kind=kind) == few
    assert reads_of(command, layers=5, kind=kind) == few
    assert sum(few.values()) <= 6


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_reads_more_often_for_more_batches(command, monkeypatch):
    as_on_a_device(monkeypatch)
    few, many = reads_of(command, number=4), reads_of(command, number=8)
    assert sum(many.values()) < sum(few.values()) + 4  # what a check does next depends on what it sees


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_waits_on_a_device_gives_the_same_statistics(command, monkeypatch):
    expected, waiting, data = network(), network(), batches(4)
    command(expected, data)
    as_on_a_device(monkeypatch)
    command(waiting, data)
    for value, other in zip(expected.state_dict().values(), waiting.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_a_standard_error_stops_at_the_same_batch_and_reads_when_it_is_looked_at(monkeypatch):
    def stopped(model, data):
        return bnlab.recalibrate(model, data, standard_error=0.1).changes.notes

    data = batches(60)
    expected = stopped(network(), data)
    as_on_a_device(monkeypatch)
    with host_reads() as reads:
        assert stopped(network(), data) == expected
    assert "the pass stops" in expected[0]
    assert sum(reads.values()) <= 20


class Reading(nn.Module):
    """A layer that reads a value of its input, as a GPU must be asked for it."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        self.read(x)
        return x


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x.mean()),
        lambda x: x.isfinite().all().item(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.mean().cpu(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x.mean().tolist(),
    ],
)
def test_one_read_in_each_batch_is_counted(read):
    def command(model, data):
        for x, _ in data:
            nn.Sequential(Reading(read), model)(x)

    assert sum(reads_of(command, number=5).values()) == 5


def test_a_watched_step_reads_nothing_until_the_interval_is_over(monkeypatch):
    as_on_a_device(monkeypatch)
    model = network(layers=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = batches(20)

    def train(steps):
        for x, labels in data[:steps]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

    with bnlab.watch(model, optimizer, every=10) as watch:
        train(1)
        with host_reads() as reads:
            train(8)
        assert not reads
        with host_reads() as reads:
            train(1)
        transfers = sum(count for (name, _), count in reads.items() if name == "cpu")
        assert 1 <= transfers <= 3  # one for each dtype: what is read from their results is on the host
        assert watch.events == ()
        assert [len(layer.samples) for layer in watch.run.layers] == [1, 1, 1]
