import contextlib
import io
import os
import pickle
import struct
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from tests.unit.lab.datasets.data_files import (
    LABELS,
    cifar_binary,
    cifar_pixels,
    one_line,
    python2_pickle,
    python3_pickle,
    restored,
    same,
)

from bnlab.errors import BnlabError, DamagedFile, MissingPackage, UnreadableFile
from bnlab.lab import datasets
from bnlab.lab.datasets import cifar10


@pytest.mark.parametrize("inner", ["", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
@pytest.mark.parametrize(
    "write", [python2_pickle, python3_pickle(0), python3_pickle(2), python3_pickle(4)], ids=["py2", "0", "2", "4"]
)
def test_cifar10_in_the_python_version(folder, inner, write):
    (folder / inner).mkdir(parents=True, exist_ok=True)
    (folder / inner / "test_batch").write_bytes(write(cifar_pixels(), LABELS))
    assert same(datasets.load("cifar10"), cifar_pixels().reshape(-1, 3, 32, 32), LABELS)


def test_the_pickle_of_python_2_is_one():
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy.core is now numpy._core
    read = pickle.loads(python2_pickle(cifar_pixels(), LABELS), encoding="latin1")
    assert np.array_equal(read["data"], cifar_pixels())
    assert read["labels"] == LABELS.tolist()


def test_cifar10_trains_on_five_files(folder):
    labels = np.arange(10, dtype=np.uint8)
    for part in range(5):
        pixels, own = cifar_pixels(part, 2), labels[2 * part : 2 * part + 2]
        (folder / f"data_batch_{part + 1}").write_bytes(python2_pickle(pixels, own))
    pixels = np.concatenate([cifar_pixels(part, 2) for part in range(5)])
    assert same(datasets.load("cifar10:train"), pixels.reshape(-1, 3, 32, 32), labels)
    (folder / "data_batch_3").unlink()
    with pytest.raises(UnreadableFile, match=r"data_batch_1 \.\. data_batch_5 \(or \.bin\) must be in a folder"):
        datasets.load("cifar10:train")


def test_cifar10_in_the_binary_version(folder):
    (folder / "cifar-10-batches-bin").mkdir()
    (folder / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(cifar_binary())
    assert same(datasets.load("cifar10"), cifar_pixels().reshape(-1, 3, 32, 32), LABELS)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("where", ["beside", "data", "labels"])
def test_no_code_of_a_pickle_runs(folder, where):
    entries = {"data": cifar_pixels(), "labels": LABELS.tolist(), "filenames": []}
    (folder / "test_batch").write_bytes(pickle.dumps({**entries, where: Bomb()}))
    if where == "beside":
        assert len(restored(datasets.load("cifar10"))[1]) == 5
    else:
        with pytest.raises(DamagedFile):
            datasets.load("cifar10")
    assert not (folder.parent / "it-ran").exists()


WHOLE = {"data": cifar_pixels(), "labels": LABELS.tolist()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "whole pickle"),
        (b"\x1f\x8b not a pickle", "whole pickle"),
        (python2_pickle(cifar_pixels(), LABELS)[:-100], "whole pickle"),
        (pickle.dumps([1, 2]), "labels must be a list of integers"),
        (pickle.dumps({**WHOLE, "labels": [1, 2, "3", 4, 5]}), "labels must be a list of integers"),
        (pickle.dumps({**WHOLE, "labels": [1 << 80] * 5}), "labels must be a list of integers"),
        (pickle.dumps({**WHOLE, "labels": [1, 2, 3, 4, 10]}), "labels must be integers from 0 to 9"),
        (pickle.dumps({**WHOLE, "labels": [1, 2]}), "file must hold a label for each of 5 images, got 2."),
        (pickle.dumps({**WHOLE, "data": cifar_pixels()[:, 1:]}), "uint8 array of shape (N, 3072)"),
        (pickle.dumps({**WHOLE, "data": cifar_pixels().astype(np.float32)}), "uint8 array of shape (N, 3072)"),
        (pickle.dumps({**WHOLE, "data": np.uint8(3)}), "uint8 array of shape (N, 3072)"),
        (pickle.dumps({"labels": []}), "uint8 array of shape (N, 3072)"),
        (pickle.dumps({"data": cifar_pixels(0, 0), "labels": []}), "file must hold a label for each of 0 images"),
        (
            python2_pickle(cifar_pixels(), LABELS).replace(struct.pack("<i", 3072), struct.pack("<i", 3073)),
            "uint8 array of shape (N, 3072)",
        ),
        (
            python2_pickle(cifar_pixels(), LABELS).replace(b"J" + struct.pack("<i", 5) + b"J", b"J\xff\xff\xff\x7fJ"),
            "uint8 array of shape (N, 3072)",
        ),
    ],
)
def test_a_python_version_that_is_damaged(folder, content, message):
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10")
    one_line(error, folder / "test_batch", message)


@pytest.mark.parametrize("content", [b"", cifar_binary()[:-1], b"\x0a" + cifar_binary()[1:]])
def test_a_binary_version_that_is_damaged(folder, content):
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10")
    one_line(error, folder / "test_batch.bin")


@pytest.mark.parametrize("at", range(0, 16000, 97))
def test_any_byte_may_be_wrong(folder, at):
    content = bytearray(python2_pickle(cifar_pixels(), LABELS))
    place = at % 260 if at < 8000 else at % len(content)
    content[place] ^= 0x41
    (folder / "test_batch").write_bytes(content)
    with contextlib.suppress(BnlabError):
        datasets.load("cifar10")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def lossless(**changes):
    arrays = {"image": cifar_pixels().reshape(5, 32, 32, 3), "label": LABELS, "jpeg_index": np.arange(5)} | changes
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


LOSSLESS, JPEG = "cifar10_lossless_train4000.npz", "cifar10_jpeg.npz"


def test_cifar10_from_lossless_arrays_is_training_data_only(folder):
    (folder / LOSSLESS).write_bytes(lossless())
    pixels = cifar_pixels().reshape(5, 32, 32, 3).transpose(0, 3, 1, 2)
    assert same(datasets.load("cifar10:train"), np.ascontiguousarray(pixels), LABELS)
    with pytest.raises(UnreadableFile, match=r"cifar10: test_batch \(or \.bin\) must be"):
        datasets.load("cifar10")


@pytest.mark.parametrize("at", range(0, 1200, 7))
def test_any_byte_of_an_archive_may_be_wrong(folder, at):
    content = bytearray(lossless())
    content[at if at < 600 else at - 1200] ^= 0x41
    (folder / LOSSLESS).write_bytes(content)
    with contextlib.suppress(BnlabError):
        datasets.load("cifar10:train")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no archive",
        lossless()[:-30],
        npy(np.zeros(3)),
        lossless()[:4000] + bytes(100) + lossless()[4100:],
        lossless(image=np.zeros((5, 3, 32, 32), np.uint8)),
        lossless(image=np.zeros((5, 32, 32, 3))),
        lossless(label=LABELS[:3]),
        lossless(label=LABELS.astype(np.float32)),
        lossless(label=np.array([1, 2, 3, 4, None], object)),
    ],
)
def test_lossless_arrays_that_are_damaged(folder, content):
    (folder / LOSSLESS).write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10:train")
    one_line(error, folder / LOSSLESS)


def test_an_archive_without_the_arrays(folder):
    with zipfile.ZipFile(folder / LOSSLESS, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY garbage")
    with pytest.raises(DamagedFile):
        datasets.load("cifar10:train")
    (folder / LOSSLESS).write_bytes(lossless())
    (folder / JPEG).write_bytes(lossless())
    with pytest.raises((DamagedFile, MissingPackage)):
        datasets.load("cifar10")


def jpeg(**changes):
    image = pytest.importorskip("PIL.Image")
    files = []
    for label in LABELS:
        buffer = io.BytesIO()
        image.new("RGB", (32, 32), (20 * int(label), 128, 255 - 20 * int(label))).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offset": np.cumsum([0, *map(len, files)]),
        "label": LABELS,
        "is_test": np.array([True, False, True, True, False]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **(arrays | changes))
    return buffer.getvalue()


def test_cifar10_from_jpeg_files(folder):
    (folder / JPEG).write_bytes(jpeg())
    for split, expected in {"test": [1, 3, 9], "train": [0, 7]}.items():
        images, labels = restored(datasets.load(f"cifar10:{split}"))
        assert labels.tolist() == expected
        assert images.shape[1:] == (3, 32, 32)
        colours = torch.tensor([[20 * label, 128, 255 - 20 * label] for label in expected]) / 255
        torch.testing.assert_close(images.mean((2, 3)), colours, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"jpeg": np.zeros(4000, np.uint8)},
        {"offset": np.array([0, 10, 20, 30, 40, 50])},
        {"offset": np.array([0, 10, 5, 30, 40, 50])},
        {"offset": np.array([0, 10, 20, 30, 40, 1 << 40])},
        {"offset": np.array([-9, 10, 20, 30, 40, 50])},
        {"offset": np.array([], np.int64)},
        {"is_test": np.zeros(5, bool)},
        {"is_test": np.zeros(4, bool)},
        {"label": LABELS[:4]},
    ],
)
def test_jpeg_files_that_are_damaged(folder, changes):
    (folder / JPEG).write_bytes(jpeg(**changes))
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10")
    one_line(error, folder / JPEG)


def test_jpeg_files_without_pillow(folder, monkeypatch):
    (folder / JPEG).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingPackage) as error:
        datasets.load("cifar10")
    one_line(error, folder / JPEG, "without Pillow, got JPEG images. Install it: pip install pillow.")


def test_the_real_cifar10_training_images(data):
    images = cifar10.read("train")
    assert tuple(images.pixels.shape) == (4000, 3, 32, 32)
    assert images.labels[:3].tolist() == [6, 9, 9]
    mean = (images.pixels.to(torch.float32) / 255).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)


def test_the_real_cifar10_test_images_are_jpeg_files(data):
    pytest.importorskip("PIL.Image")
    batches = datasets.load("cifar10")
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert tuple(images.shape) == (10000, 3, 32, 32)
    assert labels.bincount().tolist() == [1000] * 10
    assert len(set(batches[0][1].tolist())) == 10  # the file is sorted by class, and the batches are not
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([0.4942, 0.4851, 0.4504]), atol=0.01, rtol=0)
