"""Padding that is counted in the statistics, and sequences and images without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from bnlab.lab import datasets
from bnlab.lab.small_networks import seeded
from bnlab.observe.passes.calling import run_batch

from .case import Setting, Subject, healthy, mishap

_CLASSES, _CHANNELS, _SIZE, _VOCABULARY = 4, 3, 32, 18
_BATCHES = 60

Batches = list[tuple[Any, Tensor]]
Layer = Callable[[int], nn.Module]


class Waves(nn.Module):
    """Two convolutions over sequences of any length, with or without a mask for the layers."""

    def __init__(self, layer: Layer = nn.BatchNorm1d, *, is_masked: bool = False) -> None:
        super().__init__()
        self.is_masked = is_masked
        self.conv1, self.bn1 = nn.Conv1d(_CHANNELS, 24, 7, padding=3, bias=False), layer(24)
        self.conv2, self.bn2 = nn.Conv1d(24, 24, 7, padding=3, bias=False), layer(24)
        self.classify = nn.Linear(24, _CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scores, from the largest values over time."""
        own = {"mask": mask} if self.is_masked else {}
        x = F.relu(self.bn1(self.conv1(x), **own))
        x = F.relu(self.bn2(self.conv2(x), **own))
        kept = x if mask is None else x * mask[:, None]
        out: Tensor = self.classify(kept.amax(2))
        return out


class DilatedWaves(nn.Module):
    """Residual dilated convolutions behind a stride; not used for calibration."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(_CHANNELS, 20, 5, 2, 2, bias=False), nn.BatchNorm1d(20)
        self.convs = nn.ModuleList(nn.Conv1d(20, 20, 3, padding=2**step, dilation=2**step) for step in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(20) for _ in range(3))
        self.classify = nn.Linear(20, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from the largest values over time."""
        x = F.relu(self.norm(self.stem(x)))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)))
        out: Tensor = self.classify(x.amax(2))
        return out


class Text(nn.Module):
    """A convolution over embeddings of token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 12, padding_idx=0)
        self.conv1, self.bn1 = nn.Conv1d(12, 32, 5, padding=2, bias=False), nn.BatchNorm1d(32)
        self.conv2, self.bn2 = nn.Conv1d(32, 32, 5, padding=2, bias=False), nn.BatchNorm1d(32)
        self.classify = nn.Linear(32, _CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores, from the largest values over the positions of the text."""
        x = F.relu(self.bn1(self.conv1(self.embed(input_ids).transpose(1, 2))))
        x = F.relu(self.bn2(self.conv2(x))) * attention_mask[:, None]
        out: Tensor = self.classify(x.amax(2))
        return out


class RecurrentText(nn.Module):
    """BN behind a recurrent layer over embeddings of token ids; not used for calibration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 12, padding_idx=0)
        self.recur = nn.GRU(12, 24, batch_first=True, bidirectional=True)
        self.bn = nn.BatchNorm1d(48)
        self.classify = nn.Linear(48, _CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores, from the largest values over the positions of the text."""
        x = F.relu(self.bn(self.recur(self.embed(input_ids))[0].transpose(1, 2))) * attention_mask[:, None]
        out: Tensor = self.classify(x.amax(2))
        return out


class Pictures(nn.Module):
    """Convolutions over images of any size, of which the held-out one has a stride instead of a pooling."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.classify = nn.Linear(24, 10)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from the largest values of the image."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.stride > 1 else F.max_pool2d(x, 2)
        out: Tensor = self.classify(F.relu(self.bn2(self.conv2(x))).amax((2, 3)))
        return out


def _fit(model: nn.Module, seed: int, batches: Batches, epochs: int = 5) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    with seeded(seed):
        for _ in range(epochs):
            for batch in batches:
                F.cross_entropy(run_batch(model, batch), batch[1]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model


def _built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with seeded(seed):
        return make()


def _wave(generator: torch.Generator, label: int, length: int) -> Tensor:
    """Return a noisy wave around 2, whose frequency is that of its class. Shape (C, L)."""
    phase = 6 * torch.rand(1, generator=generator)
    wave = torch.sin(2 * torch.pi * (0.05 + 0.06 * label) * torch.arange(length) + phase)
    return 2 + wave + 0.3 * torch.randn(_CHANNELS, length, generator=generator)


Collate = Callable[[Sequence[Tensor], Tensor], tuple[Any, Tensor]]


def _waves(seed: int, count: int, collate: Collate, lengths: Callable[[torch.Generator], list[int]]) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        labels = torch.randint(_CLASSES, (_SIZE,), generator=generator)
        samples = zip(labels.tolist(), lengths(generator), strict=True)
        batches.append(collate([_wave(generator, label, length) for label, length in samples], labels))
    return batches


def _any_length(generator: torch.Generator) -> list[int]:
    """Return one length for each sample; most are short, as utterances and sentences are."""
    return (12 + 88 * torch.rand(_SIZE, generator=generator) ** 2).long().tolist()


def _one_length(generator: torch.Generator) -> list[int]:
    """Return the same length for all samples of a batch."""
    return [int(torch.randint(12, 100, (1,), generator=generator))] * _SIZE


def _stacked(samples: Sequence[Tensor], *, length: int | None = None, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return the samples padded to one length, and their own lengths."""
    lengths = torch.tensor([sample.size(-1) for sample in samples])
    longest = length or int(lengths.max())
    rests = [longest - sample.size(-1) for sample in samples]
    rows = [F.pad(sample, (rest, 0) if left else (0, rest)) for sample, rest in zip(samples, rests, strict=True)]
    return torch.stack(rows), lengths


def _padded_to_the_longest(samples: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    return _stacked(samples)[0], labels


def _waves_network(setting: Setting) -> nn.Module:
    return _built(DilatedWaves if setting.held_out else Waves, setting.seed)


@mishap
def padded_sequences(setting: Setting) -> Subject:
    """Training sequences are padded to the longest of their batch. Those of the evaluation come in one length each."""
    seed = setting.seed
    train = _waves(seed, _BATCHES, _padded_to_the_longest, _any_length)
    test = _waves(seed + 500, 20, _padded_to_the_longest, _one_length)
    return Subject(_fit(_waves_network(setting), seed, train), test, train)


@mishap
def padded_sequences_with_lengths(setting: Setting) -> Subject:
    """Sequences are padded at the beginning to one length. The batches hold their lengths, which nothing uses."""
    seed = setting.seed

    def collate(samples: Sequence[Tensor], labels: Tensor) -> tuple[Any, ...]:
        x, lengths = _stacked(samples, length=100, left=True)
        return x, labels, lengths

    train, test = (_waves(seed + more, count, collate, _any_length) for more, count in [(0, _BATCHES), (500, 20)])
    return Subject(_fit(_waves_network(setting), seed, train), test, train)


def _texts(seed: int, count: int, lengths: Callable[[torch.Generator], list[int]]) -> Batches:
    """Return token ids in dicts with an attention mask. Each class prefers some pairs of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        labels = torch.randint(_CLASSES, (_SIZE,), generator=generator)
        own = torch.tensor(lengths(generator))
        ids = torch.randint(1, _VOCABULARY, (_SIZE, int(own.max())), generator=generator)
        follows = 1 + (ids[:, :-1] + 3 * labels[:, None]) % (_VOCABULARY - 1)
        ids[:, 1:] = torch.where(torch.rand(follows.shape, generator=generator) < 0.4, follows, ids[:, 1:])
        mask = torch.arange(ids.size(1)) < own[:, None]
        batches.append(({"input_ids": ids * mask, "attention_mask": mask.long()}, labels))
    return batches


def _of_texts(setting: Setting, lengths: Callable[[torch.Generator], list[int]]) -> Subject:
    seed = setting.seed
    model = _built(RecurrentText if setting.held_out else Text, seed)
    train = _texts(seed, _BATCHES, lengths)
    return Subject(_fit(model, seed, train), _texts(seed + 500, 20, lengths), train)


@mishap
def padded_tokens_with_an_attention_mask(setting: Setting) -> Subject:
    """Token ids are padded to the longest text of their batch. The attention mask does not reach the BN layers."""
    return _of_texts(setting, _any_length)


def _pictures(setting: Setting, *, is_padded: bool) -> Subject:
    """Return a network on parts of digits, padded to the largest of their batch or of one size in a batch."""
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)

    def batches(split: str) -> Batches:
        images, labels = datasets.read(f"digits:{split}").batch()
        order = torch.randperm(len(labels), generator=generator)
        made = []
        for part in torch.split(order, _SIZE):
            sizes = torch.randint(18, 25, (len(part), 2), generator=generator)
            sizes = sizes if is_padded else sizes[:1].expand(len(part), 2)
            x = torch.zeros(len(part), 1, *sizes.max(0).values.tolist())
            scaled = 0.5 + F.interpolate(images[part], (24, 24), mode="bilinear")
            scaled = scaled + 0.05 * torch.randn(scaled.shape, generator=generator)
            for row, image, (height, width) in zip(x, scaled, sizes.tolist(), strict=True):
                top, left = (24 - height) // 2, (24 - width) // 2
                row[:, :height, :width] = image[:, top : top + height, left : left + width]
            made.append((x, labels[part]))
        return made

    train, test = batches("train"), batches("test")
    model = _built(lambda: Pictures(2 if setting.held_out else 1), seed)
    return Subject(_fit(model, seed, train, epochs=10), test, train)


@mishap
def images_padded_to_the_largest(setting: Setting) -> Subject:
    """Images of different size are padded with 0 to the largest of their batch, at the right and at the bottom."""
    return _pictures(setting, is_padded=True)


@healthy
def images_of_one_size_per_batch(setting: Setting) -> Subject:
    """The images of a batch have one size, which differs between batches."""
    return _pictures(setting, is_padded=False)


@healthy
def sequences_of_one_length_per_batch(setting: Setting) -> Subject:
    """A bucket holds sequences of one length, so that nothing is padded."""
    seed = setting.seed
    train = _waves(seed, _BATCHES, _padded_to_the_longest, _one_length)
    test = _waves(seed + 500, 20, _padded_to_the_longest, _one_length)
    return Subject(_fit(_waves_network(setting), seed, train), test, train)


@healthy
def tokens_of_one_length_per_batch(setting: Setting) -> Subject:
    """The texts of a batch have one length. Their attention mask keeps every token."""
    return _of_texts(setting, _one_length)


@healthy
def padded_sequences_with_masked_layers(setting: Setting) -> Subject:
    """Sequences are padded to the longest of their batch, and the layers of bnlab get the mask."""
    seed = setting.seed

    def collate(samples: Sequence[Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        x, lengths = _stacked(samples)
        return {"x": x, "mask": torch.arange(x.size(2)) < lengths[:, None]}, labels

    train, test = (_waves(seed + more, count, collate, _any_length) for more, count in [(0, _BATCHES), (500, 20)])
    model = _built(lambda: Waves(bnlab.nn.BatchNorm1d, is_masked=True), seed)
    return Subject(_fit(model, seed, train), test, train)


@healthy
def curves_with_a_saturated_end(setting: Setting) -> Subject:
    """Curves of one length rise until the sensor saturates. Integers beside them are labels and no lengths."""
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        labels = torch.randint(_CLASSES, (_SIZE,), generator=generator)
        slopes = 3 + 4 * labels[:, None] + 3 * torch.rand(_SIZE, _CHANNELS, generator=generator)
        curves = slopes[:, :, None] * torch.linspace(0, 1, 80)
        noise = 0.3 * torch.randn(_SIZE, _CHANNELS, 80, generator=generator)
        return (curves + noise).clamp(max=4), labels

    train: Batches = [batch() for _ in range(_BATCHES)]
    test: Batches = [batch() for _ in range(20)]
    return Subject(_fit(_waves_network(setting), seed, train), test, train)
