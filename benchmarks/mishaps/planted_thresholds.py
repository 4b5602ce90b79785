"""Mishaps next to the thresholds of checks, and healthy networks just as near to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .case import Setting, Subject, healthy, mishap
from .networks import Batches, batched, bns, build, fit, norm_paths

_SENSORS = 4


@mishap
def variances_of_twice_the_data(setting: Setting) -> Subject:
    """The variances of two processes were added up where they should have been averaged."""
    net = setting.network()
    for layer in bns(net.model):
        assert layer.running_var is not None
        layer.running_var *= 2
    return Subject(net.model, net.test, net.train, planted=tuple(norm_paths(net.model)))


@healthy
def contrast_varied_in_training(setting: Setting) -> Subject:
    """The contrast varied by up to 30 % in training, so the variances are a little larger than those of the data."""
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)

    def vary(images: Tensor) -> Tensor:
        return images * (0.9 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator))

    model = fit(setting.untrained(), seed, prepare=vary)
    return Subject(model, batched("test", seed), batched("train", seed))


def _features(batches: Batches, change: Callable[[Tensor], Tensor]) -> Batches:
    """Return 16 random projections of every image, with a variance of about 1, and the labels."""
    weights = torch.randn(64, 16, generator=torch.Generator().manual_seed(7)) / 8
    return [(change(images.flatten(1) @ weights), labels) for images, labels in batches]


def _of_features(setting: Setting, change: Callable[[Tensor], Tensor], *, momentum: float = 0.1) -> Subject:
    """Return an MLP that normalises the features first."""
    seed = setting.seed
    width = 24 if setting.held_out else 32
    train = _features(batched("train", seed), change)

    def make() -> nn.Module:
        layers = [nn.Linear(16, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)]
        return nn.Sequential(nn.BatchNorm1d(16), *layers)

    model = build(make, seed)
    bns(model)[0].momentum = momentum
    fit(model, seed, batches=train, epochs=8)
    return Subject(model, _features(batched("test", seed), change), train)


@mishap
def few_updates_on_small_features(setting: Setting) -> Subject:
    """The momentum of the first layer is 0.01 in a run of 168 updates, and the features have a variance of 1e-6."""
    return _of_features(setting, lambda features: 1e-3 * features, momentum=0.01)


@healthy
def few_updates_on_standardised_features(setting: Setting) -> Subject:
    """The momentum of the first layer is 0.001, and the features are like the initial mean 0 and variance 1."""
    seed = setting.seed
    known = torch.cat([features for features, _ in _features(batched("train", seed), lambda features: features)])
    mean, std = known.mean(0), known.std(0)
    return _of_features(setting, lambda features: (features - mean) / std, momentum=0.001)


@healthy
def features_in_different_units(setting: Setting) -> Subject:
    """The features come in units from thousandths to thousands, and the first layer normalises them."""
    units = 10.0 ** torch.linspace(-1, 3, 16)
    return _of_features(setting, lambda features: units * features)


@mishap
def mean_of_a_hundred_standard_deviations(setting: Setting) -> Subject:
    """The features are far from zero: float32 keeps them, and bfloat16 loses them."""
    return _of_features(setting, lambda features: features + 100)


@healthy
def mean_of_twenty_standard_deviations(setting: Setting) -> Subject:
    """The features are not so far from zero that half precision loses them."""
    return _of_features(setting, lambda features: features + 20)


def _sensors(batches: Batches, off: float, generator: torch.Generator) -> Batches:
    """Return images of four sensors: three see the digit, and the noise of the last one has the standard deviation."""
    return [
        (torch.cat([x, x.flip(2), x.flip(3), off * torch.randn(x.shape, generator=generator)], 1), y)
        for x, y in batches
    ]


def _of_sensors(setting: Setting, off: float) -> Subject:
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)
    train, test = (_sensors(batched(split, seed), off, generator) for split in ("train", "test"))
    each = 6 if setting.held_out else 4

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(_SENSORS, _SENSORS * each, 3, padding=1, groups=_SENSORS, bias=False),
            nn.BatchNorm2d(_SENSORS * each),
            nn.ReLU(),
            nn.Conv2d(_SENSORS * each, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    return Subject(fit(build(make, seed), seed, batches=train), test, train)


@mishap
def sensor_that_was_off(setting: Setting) -> Subject:
    """One of four sensors was off in training. Its noise of 1e-4 is amplified to the size of the other signals."""
    return _of_sensors(setting, 1e-4)


@healthy
def sensor_with_a_weak_signal(setting: Setting) -> Subject:
    """One of four sensors has a tenth of the signal of the others."""
    return _of_sensors(setting, 0.1)


@healthy
def filters_divided_by_ten(setting: Setting) -> Subject:
    """A quarter of the filters of each convolution are divided by 10, and the statistics with them."""
    net = setting.network("resnet")
    modules = dict(net.model.named_modules())
    pairs = [(modules[""][0], modules[""][1])]
    pairs += [(block.conv1, block.bn1) for block in modules.values() if hasattr(block, "bn1")]
    with torch.no_grad():
        for conv, layer in pairs:
            few = slice(0, layer.num_features // 4)
            conv.weight[few] /= 10
            layer.running_mean[few] /= 10
            layer.running_var[few] /= 100
    return Subject(net.model, net.test, net.train)
