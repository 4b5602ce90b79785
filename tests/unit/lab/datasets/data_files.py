"""Small files in the formats of the data sets, and helpers that compare what is read from them."""

import gzip
import pickle
import struct

import numpy as np
import torch

LABELS = np.array([3, 0, 9, 1, 7], np.uint8)


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


def cifar_binary():
    return np.concatenate([LABELS[:, None], cifar_pixels()], axis=1).tobytes()


def python2_pickle(pixels, labels):
    """Return a pickle as cPickle of Python 2 wrote it: text is bytes, and numpy has its old module names."""

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
    """Return the images and labels of all batches, sorted by label."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = labels.argsort()
    return images[order], labels[order]


def same(batches, pixels, labels):
    """Whether batches hold these images and labels, each image beside its own label."""
    images, restored_labels = restored(batches)
    order = np.argsort(labels)
    assert images.dtype == torch.float32
    assert restored_labels.dtype == torch.int64
    assert restored_labels.tolist() == labels[order].tolist()
    return torch.equal(images, torch.from_numpy(pixels[order]).float() / 255)


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert all(str(part) in message for part in parts), message
