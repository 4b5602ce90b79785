"""Mishaps of the training: momentum, loaders, batch sizes, freezing, precision."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, mishap
from .networks import Batches, batched, bns, build, cnn, cut, fit, forward_only, images_of, mlp


def _trained_with(setting: Setting, momentum: float, epochs: int = 8) -> Subject:
    seed = setting.seed
    model = fit(setting.untrained(momentum=momentum), seed, epochs=epochs)
    return Subject(model, batched("test", seed), batched("train", seed))


@mishap
def momentum_is_a_decay_of_09(setting: Setting) -> Subject:
    """The decay 0.9 of TensorFlow is used as torch's momentum."""
    return _trained_with(setting, 0.9)


@mishap
def momentum_is_a_decay_of_099(setting: Setting) -> Subject:
    """The decay 0.99 of Keras is used as torch's momentum."""
    return _trained_with(setting, 0.99)


@mishap
def momentum_zero(setting: Setting) -> Subject:
    """The momentum is 0, which was meant as a cumulative average."""
    return _trained_with(setting, 0.0)


@mishap
def momentum_too_small_for_the_run(setting: Setting) -> Subject:
    """The momentum is 0.001 in a run of 168 updates."""
    return _trained_with(setting, 0.001)


@mishap
def short_run_with_a_small_momentum(setting: Setting) -> Subject:
    """The momentum is 0.01 in a run of 105 updates."""
    return _trained_with(setting, 0.01, epochs=5)


@mishap
def always_trained_in_eval_mode(setting: Setting) -> Subject:
    """A misplaced eval() before the training loop leaves the initial statistics."""
    seed = setting.seed
    model = fit(setting.untrained(), seed, train_mode=False)
    return Subject(model, batched("test", seed), batched("train", seed))


def _sorted(split: str, size: int) -> Batches:
    images, labels = images_of(split)
    order = labels.argsort(stable=True)
    return cut(images[order], labels[order], size)


@mishap
def sorted_training_loader(setting: Setting) -> Subject:
    """The training loader is sorted by class and does not shuffle."""
    seed = setting.seed
    batches = _sorted("train", 64)
    model = fit(build(cnn, seed), seed, batches=batches)
    return Subject(model, batched("test", seed), batches)


@mishap
def grouped_training_loader(setting: Setting) -> Subject:
    """Every batch of the training loader holds two classes, as if each came from one scene."""
    seed = setting.seed
    images, labels = images_of("train")
    generator = torch.Generator().manual_seed(seed)
    batches: Batches = []
    for _ in range(40):
        pair = torch.randperm(10, generator=generator)[:2]
        of_pair = torch.isin(labels, pair).nonzero().flatten()
        chosen = of_pair[torch.randperm(len(of_pair), generator=generator)[:32]]
        batches.append((images[chosen], labels[chosen]))
    model = fit(build(cnn, seed), seed, batches=batches, epochs=4)
    return Subject(model, batched("test", seed), batches)


@mishap
def sorted_evaluation_loader(setting: Setting) -> Subject:
    """The evaluation data is sorted by class, and the network is healthy."""
    net = setting.network()
    return Subject(net.model, _sorted("test", 32), net.train)


@mishap
def batches_of_two(setting: Setting) -> Subject:
    """An MLP is trained and evaluated with batches of two."""
    seed = setting.seed
    model = fit(build(mlp, seed), seed, size=2, epochs=1, rate=1e-3)
    return Subject(model, batched("test", seed, 2), batched("train", seed, 2)[:300])


@mishap
def one_batch_of_two(setting: Setting) -> Subject:
    """The network always sees the same batch of 1e5 and 2e5. The cause is the Bessel correction, not the momentum."""
    x, target = torch.tensor([[1e5], [2e5]]), torch.tensor([0, 1])

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2))

    model = build(make, setting.seed)
    optimizer = torch.optim.SGD(bns(model)[0].parameters(), lr=0.1)
    for _ in range(300):
        F.cross_entropy(model(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    batches = [(x, target)] * 4
    return Subject(model, batches, batches, metric=None)


@mishap
def micro_batches_of_four(setting: Setting) -> Subject:
    """Gradients are accumulated over micro-batches of four, but statistics are not."""
    seed = setting.seed
    model = fit(build(mlp, seed), seed, size=4, accumulate=8, epochs=2)
    return Subject(model, batched("test", seed), batched("train", seed, 4))


@mishap
def one_value_per_channel(setting: Setting) -> Subject:
    """BN normalises a map of 1x1 with batches of two images."""
    seed = setting.seed

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    model = fit(build(make, seed), seed, size=2, epochs=1, rate=1e-3)
    return Subject(model, batched("test", seed, 2), batched("train", seed, 2)[:200])


@mishap
def two_domains_through_one_layer(setting: Setting) -> Subject:
    """Batches of real and of inverted faint images alternate. The evaluation uses real images."""
    seed = setting.seed
    mixed = [(-0.5 * x - 1 if index % 2 else x, y) for index, (x, y) in enumerate(batched("train", seed))]
    model = fit(build(cnn, seed), seed, batches=mixed)
    return Subject(model, batched("test", seed), mixed)


@mishap
def learning_rate_raised_at_the_end(setting: Setting) -> Subject:
    """In the last steps, the weights change faster than the average with momentum 0.01 follows."""
    seed = setting.seed
    model = fit(build(cnn, seed, momentum=0.01), seed, size=32, epochs=12)
    model = fit(model, seed, batches=batched("train", seed)[:12], epochs=1, rate=0.1, decaying=False)
    return Subject(model, batched("test", seed), batched("train", seed))


@mishap
def fine_tuned_in_eval_mode(setting: Setting) -> Subject:
    """The network is fine-tuned on inverted images with BN in eval mode, and keeps the statistics of the old images."""
    net = setting.network()
    inverted = [(1 - 2 * x, y) for x, y in net.train]
    model = fit(net.model, setting.seed, batches=inverted, epochs=3, rate=2e-3, train_mode=False)
    return Subject(model, [(1 - 2 * x, y) for x, y in net.test], inverted)


@mishap
def frozen_but_updating(setting: Setting) -> Subject:
    """BN is frozen by requires_grad only, and the training loop calls train()."""
    net = setting.network()
    for layer in bns(net.model):
        layer.requires_grad_(requires_grad=False)
    model = fit(net.model, setting.seed, epochs=2, rate=1e-3)
    return Subject(model, net.test, net.train)


def _stuck(setting: Setting, dtype: torch.dtype, momentum: float, updates: int, *, up_to: float) -> Subject:
    """Run a trained network in a narrow dtype until its statistics no longer change."""
    net = setting.network("mlp")
    model = net.model
    train = [(images.to(dtype), labels) for images, labels in net.train]
    with torch.no_grad():
        for layer, producer in zip(bns(model), (m for m in model.modules() if isinstance(m, nn.Linear)), strict=False):
            producer.weight.mul_(up_to)
            layer.eps = layer.eps * up_to**2
    model.to(dtype)
    forward_only(model, list(itertools.islice(itertools.cycle(train), updates)), momentum=momentum)
    for layer in bns(model):
        layer.momentum = momentum
    return Subject(model, [(images.to(dtype), labels) for images, labels in net.test], train)


@mishap
def bfloat16_statistics_stuck(setting: Setting) -> Subject:
    """Buffers in bfloat16 no longer change when an update with momentum 0.01 rounds to 0."""
    return _stuck(setting, torch.bfloat16, 0.01, 700, up_to=4.0)


@mishap
def float16_statistics_stuck(setting: Setting) -> Subject:
    """Buffers in float16 no longer change when an update with momentum 0.001 rounds to 0."""
    return _stuck(setting, torch.float16, 0.001, 6000, up_to=4.0)


@mishap
def weight_decay_on_affine(setting: Setting) -> Subject:
    """The optimizer applies weight decay to all of model.parameters()."""
    seed = setting.seed
    model = build(cnn, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    fit(model, seed, optimizer=optimizer)
    return Subject(model, batched("test", seed), batched("train", seed), optimizer=optimizer)


@mishap
def inf_batch(setting: Setting) -> Subject:
    """After one batch with an inf, the optimizer step is skipped, but the statistics are updated."""
    net = setting.network()
    images = net.train[0][0].clone()
    images[3, 0, 2, 2] = float("inf")
    with torch.no_grad():
        net.model(images)
    return Subject(net.model, net.test, net.train)
