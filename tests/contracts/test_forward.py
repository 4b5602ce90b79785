"""Every command that runs a model calls it through forward=, in every pass, proof and built-in metric."""

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.lab import metrics


class Odd(nn.Module):
    """A classifier with a batch norm that no form of a batch fits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)
        self.calls = 0

    def forward(self, *, one, two):
        return self.head(self.relu(self.bn(self.conv(one + 0 * two))).mean((2, 3)))


class Batch:
    """A batch of a class that bnlab does not know."""

    def __init__(self, seed, device):
        generator = torch.Generator().manual_seed(seed)
        self.images = (2 + torch.randn(16, 3, 6, 6, generator=generator)).to(device)
        self.labels = torch.randint(0, 3, (16,), generator=generator).to(device)


def forward(model, batch):
    return model(one=batch.images, two=batch.images)


def loss(model, batch):
    return nn.functional.cross_entropy(forward(model, batch), batch.labels)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Odd().to(device)


@pytest.fixture
def batches(device):
    return [Batch(seed, device) for seed in range(4)]


def test_check_calls_the_model_through_it(model, batches):
    diagnosis = bnlab.check(model, data=batches, train_data=batches, loss=loss, forward=forward)
    (layer,) = diagnosis.layers
    assert diagnosis.failure is None
    assert layer.calls == 1
    assert layer.inputs == ("conv",)
    assert layer.gap is not None
    assert {outcome.status for outcome in diagnosis.outcomes} <= {"findings", "passed", "skipped"}


def test_repair_recalibrates_through_it(model, batches):
    receipt = bnlab.repair(model, data=batches, train_data=batches, forward=forward, force=True)
    assert receipt.changes.kept
    with torch.no_grad():
        inputs = torch.cat([model.conv(batch.images) for batch in batches])
    assert torch.allclose(model.bn.running_mean, inputs.mean((0, 2, 3)), atol=1e-5)


def test_fold_proves_the_copy_through_it(model, batches):
    receipt = bnlab.fold(model, batches[0], forward=forward)
    assert isinstance(receipt.model.bn, nn.Identity)
    model.eval()
    assert torch.allclose(forward(receipt.model, batches[1]), forward(model, batches[1]), atol=1e-5)


def test_convert_fuses_through_it(model, batches):
    before = model.train()(one=batches[0].images, two=batches[0].images)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=batches[0], forward=forward)
    assert model.bn.activation == "relu"
    assert torch.allclose(forward(model.train(), batches[0]), before, atol=1e-5)


@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.loss])
def test_built_in_metrics_get_it(metric, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(device)
    data = [({"wrong": torch.randn(8, 4).to(device)}, torch.randint(0, 3, (8,)).to(device)) for _ in range(4)]

    def call(model, batch):
        return model(batch[0]["wrong"])

    plain = [(batch["wrong"], labels) for batch, labels in data]
    diagnosis = bnlab.check(model, data=data, metric=metric, forward=call)
    assert diagnosis.numbers.eval_running == pytest.approx(metric(model.eval(), plain))
    assert metric(model, data, forward=call) == metric(model, plain)


@pytest.mark.parametrize(
    ("command", "call"),
    [
        ("check", lambda model, batches: bnlab.check(model, data=batches, forward=3)),
        ("repair", lambda model, batches: bnlab.repair(model, data=batches, forward=3)),
        ("recalibrate", lambda model, batches: bnlab.recalibrate(model, batches, forward=3)),
        ("fold", lambda model, batches: bnlab.fold(model, batches[0], forward=3)),
        ("convert", lambda model, batches: bnlab.convert(model, bnlab.nn.BatchNorm2d, forward=3)),
    ],
)
def test_it_must_be_callable(model, batches, command, call):
    with pytest.raises(UsageError, match=f"{command}: forward must be callable, got int"):
        call(model, batches)
