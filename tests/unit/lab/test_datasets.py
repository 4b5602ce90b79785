import contextlib
import gzip
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

from bnlab.errors import BnlabError, DamagedFile, MissingPackage, UnreadableFile, UsageError
from bnlab.lab import datasets
from bnlab.lab.datasets import cifar10, digits, mnist

LABELS = np.array([3, 0, 9, 1, 7], np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder that is searched and may hold anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = tmp_path / "sets"
    inside.mkdir()
    monkeypatch.setenv("BNLAB_DATA", str(inside))
    return inside


def idx(array, magic):
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def mnist_images(count=5):
    return np.arange(count * 784, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)


def write_mnist(folder, prefix="t10k", *, images=None, labels=None, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "images-idx3": idx(mnist_images(), 2051) if images is None else images,
        "labels-idx1": idx(LABELS, 2049) if labels is None else labels,
    }
    for kind, content in contents.items():
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


def cifar_pixels(seed=0, count=5):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def python2_pickle(pixels, labels):
    """Write what cPickle of Python 2 wrote: text is bytes, numpy is named as it was."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    values = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        b"(" + number(1) + b"".join(map(number, pixels.shape)) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        b"\x89T" + struct.pack("<i", len(values)) + values + b"tb"
    )
    listed = b"](" + b"".join(map(number, labels.tolist())) + b"e"
    return b"\x80\x02}(" + text(b"labels") + listed + text(b"data") + array + b"u."


def python3_pickle(protocol):
    def write(pixels, labels):
        return pickle.dumps({b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"a.png"]}, protocol)

    return write


def restored(batches):
    """Return images and labels of all batches, in the order of the labels."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = labels.argsort()
    return images[order], labels[order]


def same(batches, pixels, labels):
    """Whether batches hold these images and labels, each image beside its own label."""
    images, found = restored(batches)
    order = np.argsort(labels)
    assert images.dtype == torch.float32
    assert found.dtype == torch.int64
    assert found.tolist() == labels[order].tolist()
    return torch.equal(images, torch.from_numpy(pixels[order]).float() / 255)


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert all(str(part) in message for part in parts), message


# The interface


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
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        datasets.load("digits", batch_size=0)


# digits


def test_digits_are_split_as_for_the_stuck_statistics():
    pytest.importorskip("sklearn")
    from bnlab.lab import stuck_statistics

    images, labels = stuck_statistics._digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out = order[: len(order) // 4]
    assert torch.equal(digits.read("test").pixels / 16, images[held_out])
    assert torch.equal(digits.read("train").labels, labels[order[len(held_out) :]])
    assert (len(held_out), len(digits.read("train").labels)) == (449, 1348)


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


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[lab\]'"):
        datasets.load("digits")


# mnist


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", ["", "mnist", "MNIST", "mnist/raw", "MNIST/raw"])
def test_mnist_in_every_folder(folder, inner, zipped):
    write_mnist(folder / inner, zipped=zipped)
    batches = datasets.load("mnist", batch_size=2)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 1, 28, 28), (2, 1, 28, 28), (1, 1, 28, 28)]
    assert same(batches, mnist_images()[:, None], LABELS)


@pytest.mark.parametrize("inner", ["data", "data/MNIST/raw", "home/.cache/bnlab/mnist"])
@pytest.mark.parametrize("variable", ["", "nowhere", None])
def test_mnist_elsewhere(folder, monkeypatch, inner, variable):
    if variable is None:
        monkeypatch.delenv("BNLAB_DATA")
    else:
        monkeypatch.setenv("BNLAB_DATA", variable)
    write_mnist(folder.parent / inner)
    assert same(datasets.load("mnist"), mnist_images()[:, None], LABELS)


def test_the_splits_of_mnist_are_two_files(folder):
    write_mnist(folder)
    write_mnist(folder, "train", images=idx(mnist_images(3), 2051), labels=idx(LABELS[:3], 2049))
    assert [len(restored(datasets.load(f"mnist:{split}"))[1]) for split in ("train", "test")] == [3, 5]


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


IMAGES = idx(mnist_images(), 2051)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
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
def test_mnist_that_is_damaged(folder, images, labels, said, zipped):
    write_mnist(folder, images=images, labels=labels, zipped=zipped)
    with pytest.raises(DamagedFile) as error:
        datasets.load("mnist")
    one_line(error, folder, said)


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

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UnreadableFile, match="ubyte: file must be readable, got: permission denied"):
        datasets.load("mnist")


# cifar10


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


def cifar_binary():
    return np.concatenate([LABELS[:, None], cifar_pixels()], axis=1).tobytes()


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
    ("content", "said"),
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
def test_a_python_version_that_is_damaged(folder, content, said):
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10")
    one_line(error, folder / "test_batch", said)


@pytest.mark.parametrize("content", [b"", cifar_binary()[:-1], b"\x0a" + cifar_binary()[1:]])
def test_a_binary_version_that_is_damaged(folder, content):
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        datasets.load("cifar10")
    one_line(error, folder / "test_batch.bin")


def test_a_file_that_is_far_too_large(folder):
    with (folder / "test_batch").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(DamagedFile, match="file must have at most 268435456 bytes, got 268435457"):
        datasets.load("cifar10")


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


# The real files


def test_the_real_mnist(data):
    test, train = mnist.read("test"), mnist.read("train")
    assert (tuple(test.pixels.shape), tuple(train.pixels.shape)) == ((10000, 1, 28, 28), (60000, 1, 28, 28))
    # what is known of the two splits: count of each digit, mean and standard deviation of the training pixels
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = train.pixels.to(torch.float32) / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(0.3081, abs=1e-4)


def test_the_real_cifar10_training_images(data):
    found = cifar10.read("train")
    assert tuple(found.pixels.shape) == (4000, 3, 32, 32)
    assert found.labels[:3].tolist() == [6, 9, 9]
    mean = (found.pixels.to(torch.float32) / 255).mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)


def test_the_real_cifar10_test_images_are_jpeg_files(data):
    pytest.importorskip("PIL.Image")
    batches = datasets.load("cifar10")
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert tuple(images.shape) == (10000, 3, 32, 32)
    assert labels.bincount().tolist() == [1000] * 10
    assert len(set(batches[0][1].tolist())) == 10  # the file is sorted by class, the batches are not
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([0.4942, 0.4851, 0.4504]), atol=0.01, rtol=0)
