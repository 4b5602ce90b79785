import io

import numpy as np
import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.hdf5_file import HDF5_MAGIC, read_hdf5

h5py = pytest.importorskip("h5py")


def written(build):
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        build(file)
    assert stream.getvalue().startswith(HDF5_MAGIC)
    stream.seek(0)
    return stream


def read(build, budget=None):
    return read_hdf5(written(build), budget or Budget())


def test_arrays_read_as_h5py_reads_them():
    random = np.random.default_rng(0)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "u1", ">f4")
    values = {f"a/{index}": (9 * random.normal(size=(3, 4))).astype(dtype) for index, dtype in enumerate(dtypes)}

    def build(file):
        for name, value in values.items():
            file[name] = value
        file.create_dataset("packed", data=values["a/0"], compression="gzip", shuffle=True, fletcher32=True)
        file["scalar"] = np.float32(3)
        file["text"] = "no numbers"

    tensors = read(build).tensors
    assert set(tensors) == {*values, "packed", "scalar"}
    for name, value in (values | {"packed": values["a/0"], "scalar": np.float32(3)}).items():
        assert tensors[name].shape == np.shape(value)
        assert np.array_equal(tensors[name].read(), value)


def test_what_keras_writes_of_bfloat16():
    def build(file):
        dataset = file.create_dataset("a", data=np.array([0x3FC0, 0xC000], dtype=np.uint16))
        dataset.attrs["dtype"] = "bfloat16"

    tensor = read(build).tensors["a"]
    assert tensor.dtype == "bfloat16"
    assert tensor.read().tolist() == [1.5, -2.0]


def test_attributes_of_keras():
    def build(file):
        file.attrs["model_config"] = "{}"
        file.create_group("a/b").attrs["name"] = "bn1"
        file["a"].attrs["weight_names"] = [b"a/x:0"]

    contents = read(build)
    assert (contents.config, contents.names, contents.collections) == ("{}", {"a/b": "bn1"}, {"a"})


def test_links_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.ones(3)

    def build(file):
        file["a/x"] = np.ones(3)
        file["a/again"] = file["a/x"]
        file["a/loop"] = file["a"]
        file["soft"] = h5py.SoftLink("/a/x")
        file["other"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")

    assert len(read(build).tensors) == 1


def test_data_in_other_files_are_refused(tmp_path):
    (tmp_path / "raw").write_bytes(np.ones(3).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.ones(3)

    def build(file):
        file.create_dataset("raw", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)])
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (3,))
        file.create_virtual_dataset("virtual", layout)

    tensors = read(build).tensors
    for name in ("raw", "virtual"):
        with pytest.raises(ValueError, match=f"{name} lies in other files"):
            tensors[name].read()


def test_huge_chunks_are_not_allocated():
    def build(file):
        file.create_dataset("a", (3,), "f8", maxshape=(None,), chunks=(1 << 26,), fillvalue=0.0)

    with pytest.raises(ValueError, match="chunks of more than 256 MB"):
        read(build).tensors["a"].read()


def test_work_has_a_budget():
    def build(file):
        for index in range(30):
            file.create_group(f"{index}")

    with pytest.raises(TooMuchWork, match="at most 100 objects"):
        read(build, Budget({**LIMITS, "objects": 100}))


def test_deep_groups_end():
    assert read(lambda file: file.create_dataset("/".join("a" * 100), data=np.ones(3))).tensors == {}
