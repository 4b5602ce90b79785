"""Training batches that come in groups: domains or classes in turn. The healthy twins mix the groups in each batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Setting, Subject, healthy, mishap
from .networks import Batches, batched, fit, images_of

_SCANNERS = ((1.0, 0.0), (0.4, 0.8), (1.5, -0.5), (0.7, -1.2), (0.25, 1.6))
"""The contrast and the brightness of each domain."""


def _as_of(scanner: int, images: Tensor) -> Tensor:
    contrast, brightness = _SCANNERS[scanner]
    return contrast * images + brightness


def _in_turn(batches: Batches, domains: int) -> Batches:
    """Return batches, of which each is from the domain after that of the batch before."""
    return [(_as_of(index % domains, images), labels) for index, (images, labels) in enumerate(batches)]


def _mixed(batches: Batches, domains: int, seed: int) -> Batches:
    """Return batches in which each sample is from a random domain."""
    generator = torch.Generator().manual_seed(seed)
    mixed: Batches = []
    for images, labels in batches:
        own = torch.randint(domains, (len(images),), generator=generator).tolist()
        mixed.append((torch.stack([_as_of(domain, image) for domain, image in zip(own, images, strict=True)]), labels))
    return mixed


def _fitted(setting: Setting, train: Batches, data: Batches) -> Subject:
    return Subject(fit(setting.untrained(), setting.seed, batches=train), data, train)


def _domains(setting: Setting, domains: int, arrange: Callable[[Batches], Batches], size: int = 64) -> Subject:
    seed = setting.seed
    data = _mixed(batched("test", seed, 32), domains, seed + 50)
    return _fitted(setting, arrange(batched("train", seed, size)), data)


@mishap
def two_domains_in_turn(setting: Setting) -> Subject:
    """Batches of two scanners alternate. The evaluation batches mix both."""
    return _domains(setting, 2, lambda batches: _in_turn(batches, 2))


@mishap
def three_domains_in_turn(setting: Setting) -> Subject:
    """Batches of three scanners come in turn. The evaluation batches mix all three."""
    return _domains(setting, 3, lambda batches: _in_turn(batches, 3))


@mishap
def five_domains_in_turn(setting: Setting) -> Subject:
    """Batches of five scanners come in turn. The evaluation batches mix all five."""
    return _domains(setting, 5, lambda batches: _in_turn(batches, 5), size=32)


@mishap
def three_groups_of_classes_in_turn(setting: Setting) -> Subject:
    """Each batch holds images of three or four classes, which belong to one of three scenes."""
    seed = setting.seed
    images, labels = images_of("train")
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.chunk(torch.randperm(10, generator=generator), 3)
    batches: Batches = []
    for index in range(24):
        of_scene = torch.isin(labels, scenes[index % 3]).nonzero().flatten()
        chosen = of_scene[torch.randperm(len(of_scene), generator=generator)[:64]]
        batches.append((images[chosen], labels[chosen]))
    return _fitted(setting, batches, batched("test", seed))


@mishap
def half_sorted_training_loader(setting: Setting) -> Subject:
    """One half of each batch is random, and the other half comes from a loader that is sorted by class."""
    seed, size, count = setting.seed, 32, 40
    images, labels = images_of("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = torch.split(order[: size * count], size // 2 * count)
    ordered = first[labels[first].argsort(stable=True)]
    places = torch.cat([ordered.view(count, -1), second.view(count, -1)], 1)
    return _fitted(setting, [(images[chosen], labels[chosen]) for chosen in places], batched("test", seed))


@healthy
def sensors_that_follow_one_quantity(setting: Setting) -> Subject:
    """Every pixel follows one random number. In six batches to evaluate on, chance moves all pixels alike."""
    generator = torch.Generator().manual_seed(setting.seed)
    pattern = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    def drawn(batches: int, size: int) -> Batches:
        quantity = torch.rand(batches * size, 1, 1, 1, generator=generator)
        images = quantity * pattern + 0.01 * torch.randn(len(quantity), 1, 8, 8, generator=generator)
        labels = (10 * quantity).long().view(-1)
        return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))

    return _fitted(setting, drawn(24, 32), drawn(6, 16))


@healthy
def three_domains_mixed_in_each_batch(setting: Setting) -> Subject:
    """Every batch holds images of three scanners, in training and in evaluation."""
    return _domains(setting, 3, lambda batches: _mixed(batches, 3, setting.seed))


@healthy
def five_domains_mixed_in_each_batch(setting: Setting) -> Subject:
    """Every batch holds images of five scanners, in training and in evaluation."""
    return _domains(setting, 5, lambda batches: _mixed(batches, 5, setting.seed), size=32)
