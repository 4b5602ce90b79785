"""Mishaps of the input data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, mishap
from .networks import MEAN, STD, Batches, Sequence, batched, bns, build, cnn, fit, forward_only, mlp


def _changed(batches: Batches, change: Callable[[Tensor], Tensor]) -> Batches:
    return [(change(images), labels) for images, labels in batches]


def _pixels(images: Tensor) -> Tensor:
    return images * STD + MEAN


def _shifted(setting: Setting, change: Callable[[Tensor], Tensor]) -> Subject:
    net = setting.network()
    return Subject(net.model, _changed(net.test, change), net.train)


@mishap
def missing_normalisation(setting: Setting) -> Subject:
    """Evaluation forgets to subtract the mean and divide by std."""
    return _shifted(setting, _pixels)


@mishap
def pixels_up_to_255(setting: Setting) -> Subject:
    """Evaluation uses pixels of 0..255 instead of 0..1."""
    return _shifted(setting, lambda images: (255 * _pixels(images) - MEAN) / STD)


@mishap
def inverted_images(setting: Setting) -> Subject:
    """Evaluation images are black on white instead of white on black."""
    return _shifted(setting, lambda images: (1 - _pixels(images) - MEAN) / STD)


@mishap
def noise(setting: Setting) -> Subject:
    """Evaluation images come from a noisier sensor."""
    generator = torch.Generator().manual_seed(setting.seed)
    return _shifted(setting, lambda images: images + torch.randn(images.shape, generator=generator))


@mishap
def low_contrast(setting: Setting) -> Subject:
    """Evaluation images come from another scanner, with 40 % of the contrast."""
    return _shifted(setting, lambda images: (0.3 + 0.4 * (_pixels(images) - 0.3) - MEAN) / STD)


@mishap
def augmented_in_training_only(setting: Setting) -> Subject:
    """Training uses strong augmentation (brightness, contrast, noise), and evaluation uses none."""
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)

    def augment(images: Tensor) -> Tensor:
        size = (len(images), 1, 1, 1)
        contrast = 1.5 + 1.5 * torch.rand(size, generator=generator)
        brightness = 1 + torch.rand(size, generator=generator)
        return contrast * images + brightness + torch.randn(images.shape, generator=generator)

    model = fit(build(cnn, seed), seed, prepare=augment)
    return Subject(model, batched("test", seed), _changed(batched("train", seed), augment))


@mishap
def padding_in_the_statistics(setting: Setting) -> Subject:
    """Training sequences are padded to three times their length, and evaluation sequences are not."""
    seed = setting.seed

    def pad(images: Tensor) -> Tensor:
        return F.pad(images, (0, 16))

    model = fit(build(Sequence, seed), seed, prepare=pad)
    return Subject(model, batched("test", seed), _changed(batched("train", seed), pad))


@mishap
def missing_normalisation_without_train_data(setting: Setting) -> Subject:
    """Evaluation forgets to normalise, and no training data distinguishes this from stale statistics."""
    net = setting.network()
    return Subject(net.model, _changed(net.test, _pixels))


@mishap
def tiny_inputs(setting: Setting) -> Subject:
    """The inputs are about 1e-6, and eps sets the scale."""
    seed = setting.seed

    def shrink(images: Tensor) -> Tensor:
        return 1e-6 * images

    model = fit(build(cnn, seed), seed, prepare=shrink)
    return Subject(model, _changed(batched("test", seed), shrink), _changed(batched("train", seed), shrink))


@mishap
def eps_of_another_framework(setting: Setting) -> Subject:
    """A first layer with a variance of 1e-4 is trained with eps 1e-5 and loaded with eps 1e-3."""
    seed = setting.seed

    def shrink(images: Tensor) -> Tensor:
        return 0.02 * images

    model = fit(build(cnn, seed), seed, prepare=shrink)
    for layer in bns(model):
        layer.eps = 1e-3
    return Subject(model, _changed(batched("test", seed), shrink), _changed(batched("train", seed), shrink))


def _normalised_first(seed: int, prepare: Callable[[Tensor], Tensor], rate: float = 5e-3) -> Subject:
    """Return an MLP that begins with BN on the raw features."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), *mlp().children())

    model = fit(build(make, seed), seed, prepare=prepare, rate=rate)
    return Subject(model, _changed(batched("test", seed), prepare), _changed(batched("train", seed), prepare))


@mishap
def time_stamps(setting: Setting) -> Subject:
    """The features have a mean of a million standard deviations."""
    return _normalised_first(setting.seed, lambda images: images + 1e6)


@mishap
def overflowing_inputs(setting: Setting) -> Subject:
    """The squares of inputs of 1e20 are beyond the range of float32."""
    return _normalised_first(setting.seed, lambda images: 1e20 * images)


@mishap
def nearly_constant_pixels(setting: Setting) -> Subject:
    """Pixels that are nearly constant are amplified a thousand times."""
    generator = torch.Generator().manual_seed(setting.seed)
    return _normalised_first(
        setting.seed, lambda images: images + 1e-4 * torch.randn(images.shape, generator=generator)
    )


@mishap
def variance_beyond_float16(setting: Setting) -> Subject:
    """The variance of unscaled inputs of 0..4095 does not fit float16."""
    seed = setting.seed

    def raw(images: Tensor) -> Tensor:
        return 4095 * _pixels(images)

    model = fit(build(cnn, seed), seed, prepare=raw)
    forward_only(model, _changed(batched("train", seed), raw))
    return Subject(model, _changed(batched("test", seed), raw), _changed(batched("train", seed), raw))
