"""Constant ends of samples are measured, and what shows that they are padding."""

import numpy as np
import pytest
import torch

from bnlab.observe.tails import input_tensors, padded_ends

LENGTHS = ((5, 9, 20), (7, 12, 20), (6, 20, 10))
"""The lengths of the samples in three batches, which are padded to 20."""


def rows(lengths, length, *, channels=2, side="end", value=0.0, seed=0):
    """Return samples of shape (N, C, L) whose values differ everywhere but in the padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), channels, length), value)
    for row, own in zip(x, lengths, strict=True):
        values = 1 + torch.rand(channels, own, generator=generator)
        if side == "end":
            row[:, :own] = values
        else:
            row[:, length - own :] = values
    return x


def fixed(**options):
    return [rows(lengths, 20, seed=index, **options) for index, lengths in enumerate(LENGTHS)]


def dynamic(**options):
    return [rows(lengths, max(lengths), seed=index, **options) for index, lengths in enumerate([(5, 9, 30), (8, 40)])]


def tails_of(batches):
    columns = input_tensors(batches)
    return padded_ends(columns[0], batches) if columns else None


def stops(tails):
    return [extents[0].stop.tolist() for extents in tails.extents]


@pytest.mark.parametrize("side", ["end", "beginning"])
def test_the_runs_at_one_end_are_the_padding(side):
    tails = tails_of(fixed(side=side))
    starts = [extents[0].start.tolist() for extents in tails.extents]
    padded = [[20 - own for own in lengths] for lengths in LENGTHS]
    assert tails.padding.side == side
    assert (stops(tails) if side == "end" else starts) == [
        [20 - count if side == "end" else count for count in counts] for counts in padded
    ]
    assert (tails.padding.samples, tails.padding.padded_samples) == (9, 6)
    assert tails.padding.share == pytest.approx(sum(map(sum, padded)) / 180)


def test_fixed_lengths_without_a_mask_are_not_certain():
    assert not tails_of(fixed()).padding.certain


def test_padding_to_the_longest_sample_of_each_batch_is_certain():
    tails = tails_of(dynamic())
    assert tails.padding.certain
    assert tails.padding.lengths == (30, 40)
    assert "different lengths" in tails.padding.proof


def test_batches_that_no_sample_fills_are_not_certain():
    longer = [torch.nn.functional.pad(x, (0, 5)) for x in dynamic()]
    assert not tails_of(longer).padding.certain


def test_tails_of_different_values_are_not_certain():
    """The last value of a curve that a sensor repeats differs between samples."""
    held_at_the_end = dynamic()
    for x in held_at_the_end:
        for index, row in enumerate(x):
            row[row == 0] = float(index)
    assert tails_of(held_at_the_end) is not None
    assert not tails_of(held_at_the_end).padding.certain


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("key", ["attention_mask", "src_key_padding_mask", "anything"])
def test_a_mask_in_a_mapping_is_certain(dtype, inverse, key):
    keep = [torch.arange(20) < torch.tensor(lengths)[:, None] for lengths in LENGTHS]
    batches = [{"x": x, key: (~mask if inverse else mask).to(dtype)} for x, mask in zip(fixed(), keep, strict=True)]
    tails = tails_of(batches)
    assert tails.padding.proof == f"`{key}` shows where it is"
    assert stops(tails) == [list(lengths) for lengths in LENGTHS]


def test_a_named_mask_leaves_real_values_in_the_statistics():
    """The last two values of each sample are 0 as well, and the mask keeps them."""
    data = fixed()
    for x, lengths in zip(data, LENGTHS, strict=True):
        for row, own in zip(x, lengths, strict=True):
            row[:, own - 2 : own] = 0
    masks = [(torch.arange(20) < torch.tensor(lengths)[:, None])[:, None] for lengths in LENGTHS]
    tails = tails_of([{"x": x, "mask": mask} for x, mask in zip(data, masks, strict=True)])
    assert stops(tails) == [list(lengths) for lengths in LENGTHS]


@pytest.mark.parametrize(
    "lengths",
    [
        lambda own: torch.tensor(own),
        lambda own: torch.tensor(own)[:, None],
        list,
    ],
    ids=["vector", "column", "list of integers"],
)
def test_lengths_beside_the_input_are_certain(lengths):
    labels = torch.arange(3)
    batches = [(x, lengths(own), labels) for x, own in zip(fixed(), LENGTHS, strict=True)]
    tails = tails_of(batches)
    assert tails.padding.proof == "`batch[1]` shows where it is"
    assert stops(tails) == [list(own) for own in LENGTHS]


def test_relative_lengths_are_lengths():
    batches = [{"x": x, "wav_lens": torch.tensor(own) / 20} for x, own in zip(fixed(), LENGTHS, strict=True)]
    assert stops(tails_of(batches)) == [list(own) for own in LENGTHS]


@pytest.mark.parametrize(
    "labels",
    [
        lambda own: torch.arange(3),
        lambda own: torch.tensor(own) - 1,
        lambda own: torch.tensor([own[0], own[1], 3]),
        lambda own: torch.full((3,), 20),
        lambda own: torch.tensor(own) % 12,
    ],
    ids=["classes", "one off", "one wrong", "all the length", "smaller numbers"],
)
def test_integer_labels_are_not_lengths(labels):
    tails = tails_of([(x, labels(own)) for x, own in zip(fixed(), LENGTHS, strict=True)])
    assert tails is not None
    assert not tails.padding.certain


def test_binary_labels_of_positions_are_no_mask():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 2, (3, 20), generator=generator) for _ in LENGTHS]
    assert not tails_of(list(zip(fixed(), labels, strict=True))).padding.certain


@pytest.mark.parametrize("key", ["attention_mask", "lengths"])
def test_a_mask_that_keeps_everything_means_that_the_constant_ends_are_real(key):
    mask = torch.ones(3, 20, dtype=torch.bool) if key == "attention_mask" else torch.full((3,), 20)
    assert tails_of([{"x": x, key: mask} for x in fixed()]) is None


def test_a_random_mask_as_of_masked_modelling_decides_nothing():
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": x, "mask": torch.rand(x.size(0), x.size(2), generator=generator) < 0.5} for x in dynamic()]
    assert tails_of(batches).padding.certain
    assert "lengths" in tails_of(batches).padding.proof


def test_token_ids_have_tails_too():
    ids = [(100 * rows(own, 20, channels=1, seed=index)).long()[:, 0] for index, own in enumerate(LENGTHS)]
    assert stops(tails_of(ids)) == [list(own) for own in LENGTHS]


def test_features_may_be_last():
    tails = tails_of([x.transpose(1, 2) for x in dynamic()])
    assert tails.padding.certain
    assert tails.extents[0][0].axis == 1


@pytest.mark.parametrize("seed", range(3))
def test_samples_without_a_constant_end_have_none(seed):
    generator = torch.Generator().manual_seed(seed)
    assert tails_of([torch.randn(8, 3, 30 + index, generator=generator) for index in range(4)]) is None


@pytest.mark.parametrize("seed", range(5))
def test_constant_stretches_inside_are_no_padding(seed):
    """Rain falls on one day in eight. Some samples end in a long dry spell."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(30, 60, (8,), generator=generator).tolist()
    series = [
        torch.randn(16, 1, n, generator=generator) * (torch.rand(16, 1, n, generator=generator) < 0.12) for n in lengths
    ]
    assert tails_of(series) is None


def test_tails_of_one_length_are_no_padding():
    """The last sensors of every sample are dead."""
    generator = torch.Generator().manual_seed(0)
    data = torch.nn.functional.pad(torch.randn(8, 20, 40, generator=generator), (0, 20))
    assert tails_of([data, data + 1]) is None


def test_constant_samples_have_no_tail():
    assert tails_of([torch.ones(4, 2, 20), torch.zeros(4, 2, 30)]) is None


def images(sizes, height, width):
    generator = torch.Generator().manual_seed(height)
    x = torch.zeros(len(sizes), 3, height, width)
    for image, (own_height, own_width) in zip(x, sizes, strict=True):
        image[:, :own_height, :own_width] = 1 + torch.rand(3, own_height, own_width, generator=generator)
    return x


def test_images_that_are_padded_to_the_largest_have_tails_along_both_axes():
    first, second = [(12, 24), (24, 10), (8, 16)], [(20, 30), (30, 22), (11, 12)]
    tails = tails_of([images(first, 24, 24), images(second, 30, 30)])
    assert tails.padding.certain
    by_axis = {extent.axis: extent.stop.tolist() for extent in tails.extents[0]}
    assert by_axis == {2: [12, 24, 8], 3: [24, 10, 16]}


@pytest.mark.parametrize("mask", [False, True])
def test_images_of_one_size_have_none(mask):
    x = images([(12, 24), (24, 10), (8, 16)], 28, 28)
    foreground = (x[:, 0] > 0).float()
    assert tails_of([(x, foreground) if mask else x] * 3) is None


def test_images_of_several_sizes_with_borders_are_not_certain():
    batches = [torch.nn.functional.pad(torch.rand(6, 3, size, size), (3, 5, 5, 4)) for size in (16, 20, 24)]
    assert tails_of(batches) is None


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(4, 2, 3, 4, 5),
        torch.randn(8),
        torch.ones(4, 20, dtype=torch.bool),
        torch.randn(4, 20, dtype=torch.complex64),
        torch.randn(4, 20).to_sparse(),
        {"attention_mask": torch.ones(4, 20), "labels": torch.ones(4, 20)},
        "text",
        (),
    ],
    ids=["five axes", "one axis", "bool", "complex", "sparse", "no input", "text", "empty"],
)
def test_other_inputs_are_not_examined(batch):
    assert input_tensors([batch, batch]) == []


def test_the_input_of_a_mapping_is_not_its_mask_or_its_labels():
    batch = {"attention_mask": torch.ones(4, 20), "input_ids": torch.ones(4, 20), "labels": torch.ones(4, 20)}
    (column,) = input_tensors([(batch, torch.zeros(4))])
    assert column[0] is batch["input_ids"]


def test_short_padding_is_left_to_the_mask():
    """Three padded positions are no tail, but a mask shows them."""
    lengths = [(18, 17, 20), (19, 20, 17)]
    data = [rows(own, 20, seed=index) for index, own in enumerate(lengths)]
    assert tails_of(data) is None
    masks = [torch.arange(20) < torch.tensor(own)[:, None] for own in lengths]
    tails = tails_of([{"x": x, "mask": mask} for x, mask in zip(data, masks, strict=True)])
    assert tails.padding.certain
    assert np.array_equal(stops(tails), lengths)
