import pytest
import torch
from tests.unit.lab.datasets.data_files import (
    LABELS,
    mnist_images,
    one_line,
    restored,
    same,
    write_mnist,
)

from bnlab.errors import UnreadableFile, UsageError
from bnlab.lab import datasets


def test_names_and_splits():
    assert datasets.NAMES == ("digits", "mnist", "cifar10")
    for spec in ("digits", "mnist:train", "cifar10:test"):
        assert datasets.is_data_set(spec)
    for spec in ("", "digits:", "digits:all", "imagenet", "Digits", "mnist:train:test", "a.b:train"):
        assert not datasets.is_data_set(spec)


def test_an_unknown_set_or_size(folder):
    with pytest.raises(UsageError) as error:
        datasets.load("imagenet")
    one_line(error, "datasets: spec must be digits, mnist, cifar10, alone or with :train or :test, got 'imagenet'.")
    with pytest.raises(UsageError, match=r"got 'digit:train'\. Did you mean 'digits:train'"):
        datasets.load("digit:train")
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        datasets.load("digits", batch_size=0)


def test_digits_are_batches_of_floats_from_0_to_1_and_always_the_same():
    pytest.importorskip("sklearn")
    first, second = datasets.load("digits"), datasets.load("digits:test")
    assert [tuple(images.shape) for images, _ in first] == [(128, 1, 8, 8)] * 3 + [(65, 1, 8, 8)]
    assert all(
        torch.equal(a, b) for left, right in zip(first, second, strict=True) for a, b in zip(left, right, strict=True)
    )
    images, labels = restored(first)
    assert (images.min(), images.max(), images.dtype) == (0, 1, torch.float32)
    assert (labels.dtype, set(labels.tolist())) == (torch.int64, set(range(10)))


def test_the_seed_of_the_caller_is_not_used_and_not_touched():
    pytest.importorskip("sklearn")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    datasets.load("digits")
    assert torch.equal(torch.rand(1), expected)


def test_stored_images_are_those_of_the_batches(folder):
    write_mnist(folder)
    assert torch.equal(datasets.read("mnist").labels, torch.from_numpy(LABELS).long())
    assert same([datasets.read("mnist:test").batch()], mnist_images()[:, None], LABELS)
    with pytest.raises(UsageError, match="spec must be"):
        datasets.read("mnist:all")


def test_a_folder_that_is_named_takes_the_place_of_the_variable(folder, tmp_path):
    other = tmp_path / "other"
    write_mnist(other, "train")
    assert datasets.first_present("mnist", "digits") == "digits"
    assert datasets.first_present("mnist", "digits", folder=other) == "mnist"
    assert datasets.chosen("auto", "mnist", "digits", folder=other) == "mnist"
    assert same(datasets.load("mnist:train", folder=other), mnist_images()[:, None], LABELS)
    write_mnist(folder)
    with pytest.raises(UnreadableFile, match=f"got none in {other} and ") as error:
        datasets.load("mnist", folder=other)
    assert str(folder) not in str(error.value)


def test_a_data_set_is_chosen_among_those_allowed(folder):
    assert datasets.chosen("auto", "mnist", "digits") == "digits"
    assert datasets.chosen("mnist", "mnist", "digits") == "mnist"
    with pytest.raises(UsageError, match="data: data must be auto, mnist or digits, got 'cifar10'"):
        datasets.chosen("cifar10", "mnist", "digits")
