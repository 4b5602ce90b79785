"""Ports that convert the statistics in a wrong way, images with exchanged colour channels, and healthy twins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnlab.lab import small_networks

from .case import Setting, Subject, healthy, mishap
from .networks import ARCHITECTURES, MEAN, STD, Batches, bns, build, cross_entropy, cut, fit, images_of

_COLORS = torch.rand(10, 3, generator=torch.Generator().manual_seed(99))
"""The colour of each digit, to which every image adds a random one."""


def _ported(setting: Setting, convert: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Subject:
    """Return a trained network that stores a function of mean, variance and eps in every layer."""
    net = setting.network()
    for layer in bns(net.model):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = convert(layer.running_mean.clone(), layer.running_var.clone(), layer.eps)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return Subject(net.model, net.test, net.train)


@mishap
def mean_and_variance_exchanged(setting: Setting) -> Subject:
    """A port takes the arrays of a layer by their place in a list, and exchanges mean and variance."""
    return _ported(setting, lambda mean, var, _: (var, mean))


@mishap
def standard_deviation_for_variance(setting: Setting) -> Subject:
    """A port stores sqrt(var + eps), as MatConvNet does, as the variance."""
    return _ported(setting, lambda mean, var, eps: (mean, (var + eps).sqrt()))


@mishap
def inverse_standard_deviation(setting: Setting) -> Subject:
    """A port stores 1/sqrt(var + eps), as old files of Torch7 do, as the variance."""
    return _ported(setting, lambda mean, var, eps: (mean, (var + eps).rsqrt()))


@healthy
def ported_with_biased_variances(setting: Setting) -> Subject:
    """A port from a framework that stores biased variances of batches of 64."""
    return _ported(setting, lambda mean, var, _: (mean, var * 63 / 64))


@healthy
def ported_in_half_precision(setting: Setting) -> Subject:
    """A port that went through a file of bfloat16."""
    return _ported(setting, lambda mean, var, _: (mean.bfloat16().float(), var.bfloat16().float()))


def _colored(split: str, seed: int, colors: Tensor = _COLORS) -> Batches:
    """Return shuffled batches of digits, of which each image has its own colour, near that of its digit."""
    images, labels = images_of(split)
    generator = torch.Generator().manual_seed(seed)
    shades = (colors[labels] + torch.rand(len(labels), 3, generator=generator)) / 2
    painted = (images * STD + MEAN) * shades[:, :, None, None]
    return cut(*small_networks.shuffled(((painted - 0.2) / 0.3, labels), generator), 64)


def _for_colors(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network whose first convolution takes three channels."""
    model = make()
    path, first = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, name = path.rpartition(".")
    wider = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=first.bias is not None)
    setattr(model.get_submodule(parent), name, wider)
    return model


def _trained_on_colors(setting: Setting, prepare: Callable[[Tensor], Tensor] = lambda images: images) -> Subject:
    seed = setting.seed
    batches = _colored("train", seed)
    model = build(lambda: _for_colors(ARCHITECTURES[setting.architecture]), seed)
    fit(model, seed, epochs=4, batches=batches, prepare=prepare)
    return Subject(model, _colored("test", seed + 500), batches, loss=cross_entropy)


def _exchanged(subject: Subject) -> Subject:
    return Subject(subject.model, [(x.flip(1), y) for x, y in subject.data], subject.train_data, loss=subject.loss)


@mishap
def exchanged_color_channels(setting: Setting) -> Subject:
    """Evaluation reads images as BGR, and training as RGB."""
    return _exchanged(_trained_on_colors(setting))


@mishap
def exchanged_color_channels_without_train_data(setting: Setting) -> Subject:
    """Evaluation reads images as BGR, and there are no training data."""
    subject = _exchanged(_trained_on_colors(setting))
    return Subject(subject.model, subject.data, loss=subject.loss)


@healthy
def color_images(setting: Setting) -> Subject:
    """A network for colour images, which it gets in the right order."""
    return _trained_on_colors(setting)


@healthy
def color_images_in_any_order(setting: Setting) -> Subject:
    """Training shuffles the colour channels of each image, so that their order does not matter."""
    generator = torch.Generator().manual_seed(setting.seed)

    def shuffle(images: Tensor) -> Tensor:
        order = torch.rand(len(images), 3, generator=generator).argsort(1)
        return images.gather(1, order[:, :, None, None].expand_as(images))

    subject = _trained_on_colors(setting, shuffle)
    mixed = [(shuffle(x), y) for x, y in _colored("train", setting.seed)]
    return Subject(subject.model, [(shuffle(x), y) for x, y in subject.data], mixed, loss=subject.loss)
