"""Mishaps of the training: momentum, loaders, batch sizes, freezing, precision."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, mishap
from .networks import ARCHITECTURES, HELD_OUT, Batches, batched, bns, build, cnn, cut, fit, forward_only, images_of, mlp


def _trained_with(setting: Setting, momentum: float, epochs: int = 8) -> Subject:
    seed = setting.seed
    make = ARCHITECTURES[HELD_OUT if setting.held_out else "cnn"]
    model = fit(build(make, seed, momentum=momentum), seed, epochs=epochs)
    return Subject(model, batched("test", seed), batched("train", seed))


@mishap
def momentum_is_a_decay_of_09(setting: Setting) -> Subject:
    """F4: the decay 0.9 of TensorFlow as torch's momentum."""
    return _trained_with(setting, 0.9)


@mishap
def momentum_is_a_decay_of_099(setting: Setting) -> Subject:
    """F4: the decay 0.99 of Keras as torch's momentum."""
    return _trained_with(setting, 0.99)


@mishap
def momentum_zero(setting: Setting) -> Subject:
    """F1: momentum 0, meant as a cumulative average."""
    return _trained_with(setting, 0.0)


@mishap
def momentum_too_small_for_the_run(setting: Setting) -> Subject:
    """F2: momentum 0.001 in a run of 168 updates."""
    return _trained_with(setting, 0.001)


@mishap
def short_run_with_a_small_momentum(setting: Setting) -> Subject:
    """F2: momentum 0.01 in a run of 105 updates."""
    return _trained_with(setting, 0.01, epochs=5)


@mishap
def always_trained_in_eval_mode(setting: Setting) -> Subject:
    """F1: a stray eval() before the loop; the statistics are the initial ones."""
    seed = setting.seed
    make = ARCHITECTURES[HELD_OUT if setting.held_out else "cnn"]
    model = fit(build(make, seed), seed, train_mode=False)
    return Subject(model, batched("test", seed), batched("train", seed))


def _sorted(split: str, size: int) -> Batches:
    images, labels = images_of(split)
    order = labels.argsort(stable=True)
    return cut(images[order], labels[order], size)


@mishap
def sorted_training_loader(setting: Setting) -> Subject:
    """F7: the training loader is sorted by class and does not shuffle."""
    seed = setting.seed
    batches = _sorted("train", 64)
    model = fit(build(cnn, seed), seed, batches=batches)
    return Subject(model, batched("test", seed), batches)


@mishap
def grouped_training_loader(setting: Setting) -> Subject:
    """F7: every batch of the training loader is of two classes, as if of one scene each."""
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
    """F31: the evaluation data comes sorted by class; the network is fine."""
    net = setting.network()
    return Subject(net.model, _sorted("test", 32), net.train)


@mishap
def batches_of_two(setting: Setting) -> Subject:
    """F5: an MLP trained and looked at with batches of two."""
    seed = setting.seed
    model = fit(build(mlp, seed), seed, size=2, epochs=1, rate=1e-3)
    return Subject(model, batched("test", seed, 2), batched("train", seed, 2)[:300])


@mishap
def program_two_of_the_article(setting: Setting) -> Subject:
    """F5: program 2 of the article, inputs 1e5 and 2e5 as the same batch of two for ever: Bessel, not momentum."""
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
    """F21: gradients are accumulated over micro-batches of four, statistics are not."""
    seed = setting.seed
    model = fit(build(mlp, seed), seed, size=4, accumulate=8, epochs=2)
    return Subject(model, batched("test", seed), batched("train", seed, 4))


@mishap
def one_value_per_channel(setting: Setting) -> Subject:
    """F5: BN on a map of 1x1 with batches of two images."""
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
    """F13: batches of real and of inverted faint images alternate; evaluation is on real ones."""
    seed = setting.seed
    mixed = [(-0.5 * x - 1 if index % 2 else x, y) for index, (x, y) in enumerate(batched("train", seed))]
    model = fit(build(cnn, seed), seed, batches=mixed)
    return Subject(model, batched("test", seed), mixed)


@mishap
def learning_rate_raised_at_the_end(setting: Setting) -> Subject:
    """F3: the weights run ahead of an average with momentum 0.01 in the last steps."""
    seed = setting.seed
    model = fit(build(cnn, seed, momentum=0.01), seed, size=32, epochs=12)
    model = fit(model, seed, batches=batched("train", seed)[:12], epochs=1, rate=0.1, decaying=False)
    return Subject(model, batched("test", seed), batched("train", seed))


@mishap
def fine_tuned_in_eval_mode(setting: Setting) -> Subject:
    """F10: fine-tuned on inverted images with BN in eval mode, so that the statistics are those of the old ones."""
    net = setting.network()
    inverted = [(1 - 2 * x, y) for x, y in net.train]
    model = fit(net.model, setting.seed, batches=inverted, epochs=3, rate=2e-3, train_mode=False)
    return Subject(model, [(1 - 2 * x, y) for x, y in net.test], inverted)


@mishap
def frozen_but_updating(setting: Setting) -> Subject:
    """F9: BN is frozen by requires_grad alone, and the loop calls train()."""
    net = setting.network()
    for layer in bns(net.model):
        layer.requires_grad_(requires_grad=False)
    model = fit(net.model, setting.seed, epochs=2, rate=1e-3)
    return Subject(model, net.test, net.train)


def _stuck(setting: Setting, dtype: torch.dtype, momentum: float, updates: int, *, up_to: float) -> Subject:
    """Run a trained network cast to a narrow dtype until its statistics move no more."""
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
    """F15: buffers kept in bfloat16 stand still when a step of momentum 0.01 rounds to nothing."""
    return _stuck(setting, torch.bfloat16, 0.01, 700, up_to=4.0)


@mishap
def float16_statistics_stuck(setting: Setting) -> Subject:
    """F15: buffers kept in float16 stand still when a step of momentum 0.001 rounds to nothing."""
    return _stuck(setting, torch.float16, 0.001, 6000, up_to=4.0)


@mishap
def weight_decay_on_affine(setting: Setting) -> Subject:
    """F25: model.parameters() with weight decay."""
    seed = setting.seed
    model = build(cnn, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    fit(model, seed, optimizer=optimizer)
    return Subject(model, batched("test", seed), batched("train", seed), optimizer=optimizer)


@mishap
def inf_batch(setting: Setting) -> Subject:
    """F15: one batch with an inf went through; the optimizer step was skipped, the statistics were not."""
    net = setting.network()
    images = net.train[0][0].clone()
    images[3, 0, 2, 2] = float("inf")
    with torch.no_grad():
        net.model(images)
    return Subject(net.model, net.test, net.train)
