import argparse
import collections
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from tests.samples import on_device, rewrite_zip, save
from torch import nn

from bnlab.observe.files.content import open_content
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.tensors import StoredTensor
from bnlab.observe.files.torch_file import is_legacy, read_legacy, read_zip

formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def read(path):
    content = open_content(path)
    return read_legacy(content) if is_legacy(content.head(64)) else read_zip(content)


def assert_same(stored, tensor):
    assert isinstance(stored, StoredTensor)
    assert stored.dtype == str(tensor.dtype).removeprefix("torch.")
    assert stored.shape == tuple(tensor.shape)
    assert np.array_equal(stored.read().astype(np.float64), tensor.detach().double().numpy())


@formats
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_read_as_torch_reads_them(tmp_path, legacy, protocol):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    base = torch.randn(6, 4)
    tensors = {str(dtype): (10 * torch.randn(5)).to(dtype) for dtype in dtypes}
    tensors |= {
        "base": base,
        "row": base[2],
        "column": base[:, 1],
        "transposed": base.T,
        "parameter": nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0),
    }
    path = save(tensors, tmp_path / "a.pt", legacy=legacy, protocol=protocol)
    loaded = torch.load(path, weights_only=protocol == 2)
    tree = read(path)
    assert list(tree) == list(loaded)
    for name, tensor in loaded.items():
        assert_same(tree[name], tensor)


def test_the_oracle_catches_a_wrong_value(tmp_path):
    tree = read(save({"a": torch.randn(4)}, tmp_path / "a.pt"))
    with pytest.raises(AssertionError):
        assert_same(tree["a"], torch.randn(4))


@formats
@pytest.mark.parametrize("device", ["cuda:2", "mps", "xla:0"])
def test_the_device_of_a_storage_does_not_matter(tmp_path, legacy, device):
    tensor = torch.randn(4)
    path = on_device(save({"a": tensor}, tmp_path / "a.pt", legacy=legacy), device)
    assert device.encode() in path.read_bytes()
    assert_same(read(path)["a"], tensor)


@formats
def test_strangers_beside_the_tensors_stay_inert(tmp_path, legacy):
    value = {
        "model": collections.OrderedDict(a=torch.ones(2)),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.9),
        "path": pathlib.Path("runs/1"),
        "counts": collections.Counter("abc"),
        "default": collections.defaultdict(list, x=[1]),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    tree = read(save(value, tmp_path / "a.pt", legacy=legacy))
    assert_same(tree["model"]["a"], torch.ones(2))
    assert isinstance(tree["args"], InertObject)
    assert tree["args"].state == {"lr": 0.1}
    assert tree["default"] == {"x": [1]}


def test_only_the_tensor_that_is_read_is_touched(tmp_path):
    path = save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "a.pt")
    # A reader would notice a record of the wrong length.
    rewrite_zip(path, lambda name, data: data[:10] if name.endswith("data/1") else data)
    tree = read(path)
    assert_same(tree["a"], torch.ones(1000))
    with pytest.raises(ValueError, match="needs 4000 bytes, its storage has 10"):
        tree["b"].read()


def test_a_compressed_archive_is_read_too(tmp_path):
    tensor = torch.randn(100)
    path = save({"a": tensor}, tmp_path / "a.pt")
    rewrite_zip(path, lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    assert_same(read(path)["a"], tensor)


def test_a_big_endian_archive(tmp_path):
    tensor = torch.randn(3)
    path = save({"a": tensor}, tmp_path / "a.pt")
    swapped = tensor.numpy().astype(">f4").tobytes()
    changed = {"byteorder": b"big", "0": swapped}
    rewrite_zip(path, lambda name, data: changed.get(pathlib.PurePath(name).name, data))
    assert_same(read(path)["a"], tensor)


def test_a_missing_storage(tmp_path):
    path = save({"a": torch.ones(3)}, tmp_path / "a.pt")
    rewrite_zip(path, lambda name, data: None if name.endswith("data/0") else data)
    with pytest.raises(ValueError, match="storage 0 is missing"):
        read(path)["a"].read()


@formats
def test_dtypes_that_no_layer_has_do_not_stop_the_others(tmp_path, legacy):
    others = {"complex": torch.zeros(3, dtype=torch.complex64), "double": torch.zeros(5, dtype=torch.complex128)}
    others |= {"float8": torch.zeros(7, dtype=torch.float8_e4m3fn), "uint16": torch.zeros(9, dtype=torch.uint16)}
    tensor = torch.randn(4)
    assert_same(read(save(others | {"a": tensor}, tmp_path / "a.pt", legacy=legacy))["a"], tensor)


def test_a_parameter_with_attributes(tmp_path):
    parameter = nn.Parameter(torch.randn(3))
    parameter.note = "mine"
    assert_same(read(save({"a": parameter}, tmp_path / "a.pt"))["a"], parameter)


def test_a_tensor_subclass(tmp_path):
    class Tagged(torch.Tensor):
        pass

    tensor = torch.randn(3).as_subclass(Tagged)
    tensor.tag = "x"
    globals()["Tagged"] = Tagged
    Tagged.__qualname__ = "Tagged"
    assert_same(read(save({"a": tensor}, tmp_path / "a.pt"))["a"], tensor.as_subclass(torch.Tensor))


def test_an_ordered_dict_the_way_python_2_pickled_it(tmp_path):
    class Old:
        def __reduce__(self):
            return collections.OrderedDict, ([["a", 1], ["b", 2]],)

    assert read(save({"state": Old()}, tmp_path / "a.pt"))["state"] == {"a": 1, "b": 2}


@formats
@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda tensor: tensor.conj().imag], ids=["conjugate", "negative"])
def test_a_view_whose_values_are_not_the_stored_ones_is_no_tensor(tmp_path, legacy, view):
    tensor = view(torch.tensor([1 + 2j, 3 - 4j]))
    assert tensor.is_conj() or tensor.is_neg()
    assert isinstance(read(save({"a": tensor}, tmp_path / "a.pt", legacy=legacy))["a"], InertObject)
