import gzip
import struct

import pytest
import torch
from tests.unit.lab.datasets.data_files import (
    LABELS,
    idx,
    mnist_images,
    one_line,
    restored,
    same,
    write_mnist,
)

from bnlab.errors import DamagedFile
from bnlab.lab import datasets
from bnlab.lab.datasets import mnist


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", ["", "mnist", "MNIST", "mnist/raw", "MNIST/raw"])
def test_mnist_in_every_folder(folder, inner, zipped):
    write_mnist(folder / inner, zipped=zipped)
    batches = datasets.load("mnist", batch_size=2)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 1, 28, 28), (2, 1, 28, 28), (1, 1, 28, 28)]
    assert same(batches, mnist_images()[:, None], LABELS)


def test_the_splits_of_mnist_are_two_files(folder):
    write_mnist(folder)
    write_mnist(folder, "train", images=idx(mnist_images(3), 2051), labels=idx(LABELS[:3], 2049))
    assert [len(restored(datasets.load(f"mnist:{split}"))[1]) for split in ("train", "test")] == [3, 5]


IMAGES = idx(mnist_images(), 2051)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", None, "file must begin with 16 bytes of idx header, got 0."),
        (IMAGES[:10], None, "file must begin with 16 bytes of idx header, got 10."),
        (idx(mnist_images(), 2052), None, "file must begin with the idx number 2051, got 2052."),
        (IMAGES[:-1], None, "file must hold 3920 bytes after its header, got 3919."),
        (IMAGES + b"\0", None, "file must hold 3920 bytes after its header, got more."),
        (IMAGES[:8] + struct.pack(">II", 27, 29), None, "with N from 1 to 1000000, got 5x27x29."),
        (struct.pack(">IIII", 2051, 2**32 - 1, 28, 28), None, "got 4294967295x28x28."),
        (struct.pack(">IIII", 2051, 0, 28, 28), None, "got 0x28x28."),
        (None, idx(LABELS[:4], 2049), "file must hold a label for each of 5 images, got 4."),
        (None, idx(LABELS + 1, 2049), "labels must be integers from 0 to 9"),
        (None, IMAGES, "file must begin with the idx number 2049, got 2051."),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_that_is_damaged(folder, images, labels, message, zipped):
    write_mnist(folder, images=images, labels=labels, zipped=zipped)
    with pytest.raises(DamagedFile) as error:
        datasets.load("mnist")
    one_line(error, folder, message)


def damaged_gzip(kind):
    whole = gzip.compress(IMAGES)
    match kind:
        case "truncated":
            return whole[: len(whole) // 2]
        case "no checksum":
            return whole[:-8]
        case "wrong checksum":
            return whole[:-8] + bytes(4) + whole[-4:]
        case "overwritten":
            return whole[:12] + bytes(40) + whole[52:]
        case "not gzipped":
            return IMAGES
        case _:
            return b""


@pytest.mark.parametrize("kind", ["truncated", "no checksum", "wrong checksum", "overwritten", "not gzipped", "empty"])
def test_a_gzip_file_that_is_damaged(folder, kind):
    write_mnist(folder, zipped=True)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(damaged_gzip(kind))
    with pytest.raises(DamagedFile) as error:
        datasets.load("mnist")
    one_line(error, folder / "t10k-images-idx3-ubyte.gz")


def test_the_real_mnist(data):
    test, train = mnist.read("test"), mnist.read("train")
    assert (tuple(test.pixels.shape), tuple(train.pixels.shape)) == ((10000, 1, 28, 28), (60000, 1, 28, 28))
    # known facts about the two splits: the count of each digit, and the mean and std of the training pixels
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = train.pixels.to(torch.float32) / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(0.3081, abs=1e-4)
