import copy
import math
from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bnlab.lab import small_networks
from bnlab.lab.small_networks import (
    accuracy,
    by_batch,
    cnn,
    cut,
    dense,
    minibatches,
    seeded,
    shuffled,
    take_step,
    train,
)


def images(count=10):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


def test_what_is_random_comes_from_the_seed_and_the_caller_keeps_his():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    with seeded(3):
        first = torch.rand(2)
    with seeded(3):
        assert torch.equal(first, torch.rand(2))
    assert torch.equal(torch.rand(1), expected)


def test_the_cnn_has_the_norm_and_the_width_of_its_arguments():
    model = cnn(lambda channels: nn.GroupNorm(2, channels), width=4)
    norms = {name: module.num_channels for name, module in model.named_children() if isinstance(module, nn.GroupNorm)}
    assert norms == {"bn1": 4, "bn2": 8, "bn3": 8}
    assert model(images()[0]).shape == (10, 10)
    assert model[:6](images()[0]).shape == (10, 8, 8, 8)
    assert model.pool(model[:6](images()[0])).shape == (10, 8, 4, 4)


def test_dropout_stands_before_the_convolutions_that_feed_a_later_norm():
    names = [name for name, _ in cnn(drop=0.5).named_children()]
    for index in (2, 3):
        place = names.index(f"drop{index}")
        assert names[place + 1 : place + 3] == [f"conv{index}", f"bn{index}"]
    assert not [module for module in cnn().modules() if isinstance(module, nn.Dropout)]
    assert cnn().state_dict().keys() == cnn(drop=0.5).state_dict().keys()


def test_the_initial_weights_do_not_depend_on_norm_or_dropout():
    states = []
    for make in (cnn, lambda: cnn(lambda channels: nn.BatchNorm2d(channels, momentum=0.5), drop=0.3)):
        with seeded(1):
            states.append(make().state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))


def test_the_dense_network_normalises_one_value_per_image():
    model = dense(nn.BatchNorm1d, width=16)
    assert [module.num_features for module in model if isinstance(module, nn.BatchNorm1d)] == [16] * 3
    assert model(images()[0]).shape == (10, 10)


def test_cutting_keeps_the_order_and_drops_the_rest():
    data = images()
    assert [labels.tolist() for _, labels in cut(data, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [labels.tolist() for _, labels in cut(data, 4, ragged=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.cat([part for part, _ in cut(data, 4, ragged=True)]), data[0])
    assert cut(data, 11) == []


def test_shuffling_keeps_each_image_beside_its_label():
    data = images()
    mixed, labels = shuffled(data, torch.Generator().manual_seed(1))
    assert labels.tolist() != data[1].tolist()
    assert torch.equal(mixed[labels.argsort()], data[0])


def test_minibatches_go_on_in_another_order():
    batches = list(islice(minibatches(images(), 4, torch.Generator().manual_seed(1)), 4))
    assert [len(labels) for _, labels in batches] == [4] * 4
    first, second = (torch.cat([labels for _, labels in batches[at : at + 2]]).tolist() for at in (0, 2))
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert len(next(minibatches(images(3), 4, torch.Generator()))[1]) == 3


def test_a_step_is_taken_on_the_mean_of_the_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    batches = [(part.double(), labels) for part, labels in cut(images(), 5)]
    before = copy.deepcopy(model)
    gradients = []
    for part, labels in batches:
        before.zero_grad()
        cross_entropy(before(part), labels).backward()
        gradients.append(before[1].weight.grad.clone())
    model[1].weight.grad = torch.full_like(model[1].weight, 1e6)  # an old gradient must not count
    take_step(model, batches, torch.optim.SGD(model.parameters(), lr=0.5))
    torch.testing.assert_close(model[1].weight, before[1].weight - 0.5 * (gradients[0] + gradients[1]) / 2)


def test_the_learning_rate_falls_along_a_cosine(monkeypatch):
    rates, steps = [], []
    monkeypatch.setattr(
        small_networks, "take_step", lambda model, batches, optimizer: rates.append(optimizer.param_groups[0]["lr"])
    )
    model = dense(nn.BatchNorm1d).eval()
    train(model, [[images()]] * 4, learning_rate=0.2, before=steps.append)
    assert rates == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5))])
    assert steps == [0, 1, 2, 3]
    assert model.training


class Answers(nn.Module):
    """A model that returns fixed scores."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, x):
        assert not self.training
        return self.scores[: len(x)]


@pytest.mark.parametrize("training", [True, False])
def test_the_accuracy_counts_what_is_not_finite_as_a_miss(training):
    scores = torch.eye(10)
    scores[0, 1:] = -math.inf
    scores[1, 2] = math.nan
    scores[2] = torch.roll(scores[2], 1)
    model = Answers(scores).train(training)
    assert accuracy(model, images()) == 0.7
    assert model.training is training


def test_a_batch_is_normalised_as_in_training_and_nothing_is_left_of_it():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(1.0), nn.Linear(64, 10)).eval()
    before = copy.deepcopy(model.state_dict())
    data = images()
    expected = (data[0].flatten(1) - data[0].flatten(1).mean(0)) / (
        data[0].flatten(1).var(0, unbiased=False) + 1e-5
    ).sqrt()
    right = (model[3](expected).argmax(1) == data[1]).double().mean()
    assert by_batch(model, [data]) == pytest.approx(float(right))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
