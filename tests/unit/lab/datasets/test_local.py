import os

import numpy as np
import pytest
from tests.unit.lab.datasets.data_files import (
    LABELS,
    idx,
    mnist_images,
    one_line,
    same,
    write_mnist,
)

from bnlab.errors import DamagedFile, UnreadableFile
from bnlab.lab import datasets


@pytest.mark.parametrize("inner", ["data", "data/MNIST/raw", "home/.cache/bnlab/mnist"])
@pytest.mark.parametrize("variable", ["", "nowhere", None])
def test_mnist_elsewhere(folder, monkeypatch, inner, variable):
    if variable is None:
        monkeypatch.delenv("BNLAB_DATA")
    else:
        monkeypatch.setenv("BNLAB_DATA", variable)
    write_mnist(folder.parent / inner)
    assert same(datasets.load("mnist"), mnist_images()[:, None], LABELS)


def test_mnist_that_is_nowhere(folder, monkeypatch):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(mnist_images(), 2051))  # without its labels
    with pytest.raises(UnreadableFile) as error:
        datasets.load("mnist")
    one_line(
        error,
        "mnist: t10k-images-idx3-ubyte[.gz] and t10k-labels-idx1-ubyte[.gz] must be in a folder that is searched, got",
        f"none in {folder} (BNLAB_DATA) and {folder.parent / 'data'} and their folders mnist, MNIST, mnist/raw, ",
        f"nor in {folder.parent / 'home/.cache/bnlab/mnist'}. Set BNLAB_DATA to the folder that holds",
    )
    monkeypatch.delenv("BNLAB_DATA")
    with pytest.raises(UnreadableFile) as error:
        datasets.load("mnist:train")
    one_line(error, "train-images", "got none in $BNLAB_DATA (not set) and ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_is_not_permitted(folder):
    write_mnist(folder)
    (folder / "t10k-images-idx3-ubyte").chmod(0)
    with pytest.raises(UnreadableFile, match="file must be readable, got: permission denied"):
        datasets.load("mnist")


def test_an_error_of_the_operating_system(folder, monkeypatch):
    write_mnist(folder)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bnlab.regular_file.os.open", refuse)
    with pytest.raises(UnreadableFile, match="ubyte: file must be readable, got: permission denied"):
        datasets.load("mnist")


def test_a_file_that_is_far_too_large(folder):
    with (folder / "test_batch").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(DamagedFile, match="file must have at most 268435456 bytes, got 268435457"):
        datasets.load("cifar10")


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
def test_a_name_that_stands_for_a_pipe_is_no_file(folder):
    os.mkfifo(folder / "test_batch")
    (folder / "cifar10_jpeg.npz").symlink_to("cifar10_jpeg.npz")
    with pytest.raises(UnreadableFile, match="must be in a folder that is searched"):
        datasets.load("cifar10")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("name", ["test_batch", "test_batch.bin", "cifar10_jpeg.npz"])
def test_a_file_that_is_a_pipe_by_the_time_it_is_opened(folder, monkeypatch, name):
    os.mkfifo(folder / name)
    monkeypatch.setattr("bnlab.lab.datasets.cifar10.is_file", lambda path: path.name == name and path.exists())
    with pytest.raises(UnreadableFile, match=f"{name}: file must be a regular file, got a folder, pipe or device"):
        datasets.load("cifar10")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_mnist_that_is_a_pipe_by_the_time_it_is_opened(folder, monkeypatch):
    write_mnist(folder)
    (folder / "t10k-images-idx3-ubyte").unlink()
    os.mkfifo(folder / "t10k-images-idx3-ubyte")
    monkeypatch.setattr("bnlab.lab.datasets.mnist.is_file", lambda path: path.exists())
    with pytest.raises(UnreadableFile, match="ubyte: file must be a regular file, got a folder, pipe or device"):
        datasets.load("mnist")


def test_arrays_that_a_small_archive_makes_large(folder):
    np.savez_compressed(folder / "cifar10_lossless_train4000.npz", image=np.zeros(1 << 28, np.uint8), label=0)
    with pytest.raises(DamagedFile, match="arrays must have at most 268435456 bytes, got 268435"):
        datasets.load("cifar10:train")
