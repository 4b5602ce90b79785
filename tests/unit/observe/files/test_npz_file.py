import io
import os
import zipfile

import numpy as np
import pytest
from tests.samples import layer_state, state_dict

from bnlab.errors import BnlabError, DamagedFile, NotACheckpoint
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import looks_like_checkpoint, read_checkpoint
from bnlab.observe.files.content import open_content
from bnlab.observe.files.npz_file import read_npy, read_npz
from bnlab.observe.files.zip_archive import read_archive


def arrays(path):
    return read_npz(read_archive(open_content(path)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_read_as_numpy_reads_them(tmp_path, save):
    random = np.random.default_rng(0)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?", ">f4", ">i8")
    values = {f"a/{index}": (9 * random.normal(size=(3, 4))).astype(dtype) for index, dtype in enumerate(dtypes)}
    values |= {
        "scalar": np.float32(3),
        "empty": np.empty((0, 2)),
        "fortran": np.asfortranarray(random.normal(size=(3, 4))),
    }
    save(tmp_path / "a.npz", **values)
    read = arrays(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as expected:
        assert read.keys() == set(expected)
        for name, tensor in read.items():
            assert tensor.shape == expected[name].shape
            assert np.array_equal(tensor.read(), expected[name])


@pytest.mark.parametrize("suffix", [".npz", ".pt", ""])
def test_the_layers_of_an_archive(tmp_path, suffix):
    np.savez(tmp_path / "a.npz", **{name: value.numpy() for name, value in state_dict("bn1", "a.bn").items()})
    path = (tmp_path / "a.npz").rename(tmp_path / f"a{suffix}")
    assert looks_like_checkpoint(path)
    (network,) = read_checkpoint(path, Hyperparameters()).networks
    assert [layer.name for layer in network.layers] == ["bn1", "a.bn"]
    assert network.layers[0].num_batches_tracked == 1000


def test_bytes_without_a_name_are_bfloat16(tmp_path):
    values = np.array([1.5, -2], dtype=np.float32)
    np.savez(tmp_path / "a.npz", a=(values.view(np.uint32) >> 16).astype(np.uint16).view("V2"))
    tensor = arrays(tmp_path / "a.npz")["a"]
    assert tensor.dtype == "bfloat16"
    assert tensor.read().tolist() == values.tolist()


def test_objects_are_never_read(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "mark"),))

    np.savez(tmp_path / "a.npz", a=np.array([Payload()], dtype=object))
    np.save(tmp_path / "b.npy", {"bn.running_mean": Payload()}, allow_pickle=True)
    for name in ("a.npz", "b.npy"):
        with pytest.raises(
            NotACheckpoint, match=r"got arrays of Python objects, .* Save the numbers by name: numpy.savez"
        ):
            read_checkpoint(tmp_path / name, Hyperparameters())
    assert not (tmp_path / "mark").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["a"]
    assert (tmp_path / "mark").exists(), "the payload must be live, or this test proves nothing"


def test_objects_beside_numbers_are_passed_over(tmp_path):
    state = {f"bn.{key}": value.numpy() for key, value in layer_state().items()}
    np.savez(tmp_path / "a.npz", **state, note=np.array(["text"]), thing=np.array([None], dtype=object))
    (network,) = read_checkpoint(tmp_path / "a.npz", Hyperparameters()).networks
    assert [layer.name for layer in network.layers] == ["bn"]


def test_one_array_is_no_network(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3.0))
    assert read_npy(open_content(tmp_path / "a.npy")).read().tolist() == [0, 1, 2]
    assert read_checkpoint(tmp_path / "a.npy", Hyperparameters()).networks == ()


def npy(header, data=b"", *, version=b"\1\0"):
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + header + data


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY",
        npy(GOOD, bytes(8), version=b"\7\0"),
        npy(GOOD, bytes(7)),
        npy(GOOD, bytes(9)),
        npy(GOOD[:-3], bytes(8)),
        npy(b"__import__('os')", bytes(8)),
        npy(b"[" * 9000, bytes(8)),
        npy(b"-" * 9000, bytes(8)),
        npy(b"(" * 20 + b")" * 20, bytes(8)),
        npy(GOOD.ljust(10_001), bytes(8)),
        npy(GOOD.replace(b"(2,)", b"(-2,)"), bytes(8)),
        npy(GOOD.replace(b"(2,)", b"(True, 2)"), bytes(8)),
        npy(GOOD.replace(b"(2,)", b"(2,)*3"), bytes(8)),
        npy(GOOD.replace(b"(2,)", str((1,) * 70 + (2,)).encode()), bytes(8)),
        npy(GOOD.replace(b"False", b"0"), bytes(8)),
        npy(GOOD.replace(b"'shape'", b"'form'"), bytes(8)),
    ],
)
def test_a_damaged_array_is_one_error(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(DamagedFile):
        read_checkpoint(path, Hyperparameters())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("bn.running_mean.npy", content)
    with pytest.raises(DamagedFile):
        read_checkpoint(tmp_path / "a.npz", Hyperparameters())


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
def test_every_version_of_the_header(tmp_path, version):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(GOOD, np.array([1, 2], dtype="<f4").tobytes(), version=version))
    assert read_npy(open_content(path)).read().tolist() == [1, 2]


def test_an_array_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(20 << 20, dtype=np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("running_mean", "running_var"):
            archive.writestr(f"bn.{key}.npy", buffer.getvalue())
    assert arrays(tmp_path / "a.npz")["bn.running_mean"].shape == (20 << 20,)
    with pytest.raises((BnlabError, ValueError), match="claims to unpack"):
        arrays(tmp_path / "a.npz")["bn.running_mean"].read()
