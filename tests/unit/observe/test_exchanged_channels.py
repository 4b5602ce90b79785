"""A network that gets its colour channels in the other order is recognised by its loss, and a healthy one is not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab
from bnlab.lab import metrics
from bnlab.observe import exchanged_channels as module
from bnlab.observe.exchanged_channels import exchanged_channels
from bnlab.observe.metric import Score
from bnlab.observe.model_evidence import ExchangedChannels
from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.subject import Subject

ACCURACY = Score(metrics.accuracy, name="accuracy")


class Color(nn.Module):
    """Normalises three channels and tells red images from blue ones by the difference of the two."""

    def __init__(self, scale=1.0, weights=(-1.0, 0.0, 1.0)):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.bn.running_mean.fill_(0.5)
        self.bn.running_var.fill_(0.1)
        self.scale, self.weights = scale, weights
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        red, green, blue = self.bn(x).mean((2, 3)).unbind(1)
        score = self.scale * (self.weights[0] * red + self.weights[1] * green + self.weights[2] * blue)
        return torch.stack([-score, score], 1)


def images(count=128, seed=0, *, size=32, contrast=0.3, noise=0.4):
    """Return batches of red images, of class 0, and of blue ones, of class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    pixels = 0.5 + noise * torch.randn(count, 3, 1, 1, generator=generator).expand(-1, -1, 4, 4)
    pixels = pixels + 0.05 * torch.randn(count, 3, 4, 4, generator=generator)
    pixels[:, 0] += contrast * (1 - 2 * labels)[:, None, None]
    pixels[:, 2] -= contrast * (1 - 2 * labels)[:, None, None]
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def exchanged(batches):
    return [(x[:, [2, 1, 0]], y) for x, y in batches]


def compared(model, batches, *, loss=None, score=None):
    return exchanged_channels(Subject(model), keep("data", batches, "auto"), loss, score)


def accuracy(model, batches):
    """Return the accuracy in eval mode from the statistics, in float64 numpy."""
    mean, var = model.bn.running_mean.double().numpy(), model.bn.running_var.double().numpy()
    x = np.concatenate([x.double().numpy() for x, _ in batches]).mean((2, 3))
    score = ((x - mean) / np.sqrt(var + 1e-5)) @ np.array(model.weights)
    return float(((score > 0) == np.concatenate([y.numpy() for _, y in batches])).mean())


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [None, cross_entropy])
def test_exchanged_channels_are_measured(seed, loss):
    model, batches = Color(), images(seed=seed)
    seen = compared(model, exchanged(batches), loss=loss, score=ACCURACY)
    assert seen is not None
    assert (seen.name, seen.batches) == ("accuracy", 4)
    assert seen.exchanged == pytest.approx(accuracy(model, batches))
    assert seen.value == pytest.approx(accuracy(model, exchanged(batches)))
    assert seen.exchanged > 0.7 > 0.3 > seen.value


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [None, cross_entropy])
def test_channels_in_the_right_order_give_no_note(seed, loss):
    assert compared(Color(), images(seed=seed), loss=loss, score=ACCURACY) is None


def test_without_a_metric_the_loss_is_reported():
    model, batches = Color(), exchanged(images())
    seen = compared(model, batches)
    assert seen is not None
    assert seen.name == "cross-entropy"
    with torch.no_grad():
        expected = [float(F.cross_entropy(model.eval()(torch.cat([x for x, _ in of])), torch.cat([y for _, y in of])))
                    for of in (batches, images())]  # fmt: skip
    assert [seen.value, seen.exchanged] == pytest.approx(expected, rel=1e-5)
    assert compared(model, images()) is None
    own = compared(model, batches, loss=cross_entropy)
    assert own is not None
    assert own.name == "loss"


def test_the_metric_of_single_batches_decides_where_nothing_else_can():
    """The labels are in an entry that bnlab does not know, so that only the metric reads them."""

    def metric(model, data):
        hits = [(model(batch["x"]).argmax(1) == batch["kind"]).float().mean() for batch in data]
        return float(torch.stack(hits).mean())

    def as_dicts(batches):
        return [{"x": x, "kind": y} for x, y in batches]

    model = Color()
    model.forward = lambda x, kind=None: Color.forward(model, x)
    seen = compared(model, as_dicts(exchanged(images())), score=Score(metric, name="hits"))
    assert seen is not None
    assert (seen.name, seen.exchanged) == ("hits", pytest.approx(accuracy(model, images())))
    assert compared(model, as_dicts(images()), score=Score(metric)) is None
    errors = Score(lambda model, data: 1 - metric(model, data), lower_is_better=True)
    assert compared(model, as_dicts(exchanged(images())), score=errors) is not None
    assert compared(model, as_dicts(images()), score=errors) is None
    few = as_dicts(exchanged(images(8, size=8)))
    assert compared(model, few, score=Score(metric)) is None, "two values do not show their spread"


def test_one_batch_is_cut_into_parts():
    assert compared(Color(), exchanged(images(size=128)), score=ACCURACY) is not None


SILENT = {
    "gray images": lambda: [(x.mean(1, keepdim=True).expand_as(x), y) for x, y in images()],
    "no labels": lambda: [x for x, _ in exchanged(images())],
    "one channel": lambda: [(x[:, :1], y) for x, y in exchanged(images())],
    "four channels": lambda: [(torch.cat([x, x[:, :1]], 1), y) for x, y in exchanged(images())],
    "bytes": lambda: [(x.to(torch.uint8), y) for x, y in exchanged(images())],
    "no space": lambda: [(x.mean((2, 3)), y) for x, y in exchanged(images())],
}


@pytest.mark.parametrize("build", SILENT.values(), ids=SILENT)
def test_other_data_give_no_note(build):
    assert compared(Color(), build()) is None


@pytest.mark.parametrize("seed", range(10))
def test_a_network_that_ignores_the_order_gets_no_note(seed):
    """Red and blue count alike, so that the exchange changes nothing but rounding."""
    batches = [(x + y[:, None, None, None], y) for x, y in images(seed=seed, contrast=0.0)]
    assert compared(Color(weights=(1.0, 0.1, 1.0)), batches, score=ACCURACY) is None
    assert compared(Color(weights=(1.0, 0.1, 1.0)), exchanged(batches), score=ACCURACY) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_significant_difference_may_be_too_small_to_matter(seed, monkeypatch):
    """The images are gray, but for a little more light in the red channel of class 1: the exchange weighs it more."""
    generator = torch.Generator().manual_seed(seed)
    batches = images(512, seed=seed, contrast=0.0)
    batches = [(x[:, :1].expand(-1, 3, -1, -1) + (y - 0.5)[:, None, None, None], y) for x, y in batches]
    tint = torch.tensor([0.1, 0.0, 0.0])[:, None, None]
    batches = [(x + tint * (2 * y - 1)[:, None, None, None], y) for x, y in batches]
    batches = [(x + 0.01 * torch.randn(len(x), 3, 1, 1, generator=generator), y) for x, y in batches]
    model = Color(weights=(1.0, 0.1, 1.2))
    assert compared(model, batches) is None
    monkeypatch.setattr(module, "_MIN_GAIN_OF_LOSS", 0.0)
    assert compared(model, batches) is not None


def test_a_loss_above_that_of_a_constant_output_shows_nothing(monkeypatch):
    """The labels are drawn by lot: the outputs that are large and wrong get less wrong, and stay worse than nothing."""
    generator = torch.Generator().manual_seed(0)
    batches = [(x, torch.randint(0, 2, y.shape, generator=generator)) for x, y in images(512)]
    model = Color(scale=8.0, weights=(-1.5, 0.0, 0.5))
    orders = [batches, exchanged(batches)]
    assert [compared(model, order) for order in orders] == [None, None]
    monkeypatch.setattr(module, "_MIN_GAIN_OF_LOSS", 0.0)
    assert [compared(model, order) for order in orders] == [None, None]


def test_stale_statistics_of_two_channels_are_not_taken_for_an_exchange():
    """The running means are those of the other order. With batch statistics the order makes no difference."""
    batches = [(x + y[:, None, None, None], y) for x, y in images(contrast=0.0, noise=0.05)]
    batches = [(x + torch.tensor([1.0, 0.0, -1.0])[:, None, None], y) for x, y in batches]
    model = Color(weights=(1.0, 0.0, 1.0))
    model.bn.weight.data = torch.tensor([1.0, 1.0, 1.0])
    model.bn.running_mean = torch.tensor([-0.5 + 0.5, 0.5, 1.5 + 0.5])
    model.bn.running_var = torch.tensor([0.02, 0.1, 0.3])
    with torch.no_grad():
        own, other = (
            np.mean([float(cross_entropy(model.eval(), batch)) for batch in of]) for of in (batches, exchanged(batches))
        )
    assert other < 0.9 * own, "the exchange must help with running statistics"
    assert compared(model, batches) is None


def test_a_loss_and_a_metric_that_contradict_each_other_give_no_note():
    misses = Score(lambda model, data: 1 - metrics.accuracy(model, data), name="misses")
    assert compared(Color(), exchanged(images()), score=misses) is None


def test_a_metric_that_fails_gives_no_note():
    def metric(model, data):
        raise ValueError("no")

    batches = [(x, y.float()) for x, y in exchanged(images())]
    assert compared(Color(), batches, score=Score(metric)) is None


def test_a_model_that_needs_larger_batches_gives_no_note():
    """Batch statistics of one value per channel do not exist."""

    class Flat(Color):
        def forward(self, x):
            return super().forward(x.mean((2, 3), keepdim=True))

    assert compared(Flat(), [(x, y) for x, y in exchanged(images(32, size=1))]) is None


def test_the_model_is_restored():
    model = Color().train()
    before = copy.deepcopy(model.state_dict())
    assert compared(model, exchanged(images()), score=ACCURACY) is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_a_healthy_network_runs_on_few_samples_only():
    model = Color()
    batches = images(1024, size=32)
    assert compared(model, batches) is None
    assert model.calls == 0, "the model is a snapshot: its attributes are restored"
    calls = []
    model.forward = lambda x: calls.append(len(x)) or Color.forward(model, x)
    assert compared(model, batches) is None
    assert sum(calls) == 32 + 2 * 64


@pytest.mark.parametrize(("batches", "expected"), [(1, "1 batch"), (8, "8 batches")])
def test_the_note_names_both_values(batches, expected):
    note = ExchangedChannels(name="accuracy", value=0.87, exchanged=0.997, batches=batches).note
    assert note == (
        "the colour channels of data may be exchanged (RGB for BGR): accuracy is 0.87 as they are, and 0.997 with "
        f"channels 0 and 2 exchanged, on {expected}"
    )


def test_a_diagnosis_holds_the_note():
    right, wrong = (bnlab.check(Color().eval(), data=data).notes for data in (images(256), exchanged(images(256))))
    assert not any("RGB for BGR" in note for note in right)
    assert any(note.startswith("the colour channels of data may be exchanged") for note in wrong)
