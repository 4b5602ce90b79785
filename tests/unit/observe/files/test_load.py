"""The reader of `bnlab check` loads a file into a model; writing the file again keeps all other bits."""

import argparse
import collections
import json
import pathlib

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.ranks import save_ranks
from tests.samples import save, small_network
from torch import nn

from bnlab.errors import DamagedFile, NotACheckpoint, PickledModule, UnreadableFile, UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.files.load import load_into, state_dict_file

KINDS = ["zip", "legacy", "safetensors"]
kinds = pytest.mark.parametrize("kind", KINDS)


def write(state, folder, kind):
    """Write a state dict in one of the formats, with objects beside it that torch.load refuses if the format allows."""
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "a.safetensors")
        return folder / "a.safetensors"
    strangers = {"args": argparse.Namespace(lr=0.1), "path": pathlib.Path("runs"), "best": np.float64(0.5)}
    return save(strangers | {"deep": [{"state_dict": state}]}, folder / "a.pt", legacy=kind == "legacy")


def fresh():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item()


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert bits(tensor) == bits(right[name]), name


def test_the_oracle_catches_one_wrong_bit():
    state = small_network().state_dict()
    wrong = state | {"1.bias": torch.nextafter(state["1.bias"], torch.tensor(9.0))}
    with pytest.raises(AssertionError):
        assert_same_bits(state, wrong)


@kinds
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "_orig_mod.module.", "model.net."])
def test_what_check_reads_can_be_loaded(tmp_path, kind, prefix):
    model, trained = fresh(), small_network().state_dict()
    path = write({f"{prefix}{name}": tensor for name, tensor in trained.items()}, tmp_path, kind)
    load_into(model, path)
    assert_same_bits(model.state_dict(), trained)
    (network,) = read_checkpoint(path, Hyperparameters()).networks
    assert [layer.name for layer in network.layers] == ["1", "4"]


@kinds
def test_a_prefix_that_the_model_has_itself_is_kept(tmp_path, kind):
    model = nn.ModuleDict({"net": nn.BatchNorm1d(2), "head": nn.BatchNorm1d(2)})
    inner = nn.ModuleDict({"net": nn.BatchNorm1d(2)})
    state = {name: tensor + 1 for name, tensor in inner.state_dict().items()}
    load_into(inner, write(state, tmp_path, kind))
    assert_same_bits(inner.state_dict(), state)
    with pytest.raises(UsageError, match=r"state dict must fit the model, got no head\.weight, no head\.bias"):
        load_into(model, write(state, tmp_path, kind))


def test_a_prefix_that_only_some_names_have_is_kept(tmp_path):
    model = fresh()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["4.bias"] = state.pop("module.4.bias")
    with pytest.raises(UsageError, match=r"got no 0\.weight, no 0\.bias, no 1\.weight and"):
        load_into(model, save(state, tmp_path / "a.pt"))
    (network,) = read_checkpoint(tmp_path / "a.pt", Hyperparameters()).networks
    assert [layer.name for layer in network.layers] == ["module.1", "module.4"]


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_bit_arrives_in_a_model_of_the_dtype(tmp_path, kind, dtype):
    state = small_network().to(dtype).state_dict()
    same_size = {2: torch.int16, 8: torch.int64}[dtype.itemsize]
    quiet_nan_with_a_payload = torch.tensor(float("nan"), dtype=dtype).view(same_size) + 5
    state["1.running_mean"].view(same_size)[0] = quiet_nan_with_a_payload
    model = fresh().to(dtype)
    load_into(model, write(state, tmp_path, kind))
    assert_same_bits(model.state_dict(), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_shared_storages_arrive_as_torch_loads_them(tmp_path, legacy):
    pool = torch.randn(6, 8)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6))
    state = model.state_dict() | {
        "0.weight": pool.T,
        "2.weight": pool,
        "1.running_mean": pool[3],
        "3.bias": pool[:, 2],
        "3.running_var": pool[:, 1].square().expand(6),
    }
    path = save(state, tmp_path / "a.pt", legacy=legacy)
    load_into(model, path)
    assert_same_bits(model.state_dict(), torch.load(path, weights_only=True))


@kinds
def test_other_dtypes_a_model_may_have_are_loaded_too(tmp_path, kind):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            dtypes = (torch.float8_e4m3fn, torch.uint16, torch.complex64, torch.bool, torch.int8)
            for index, dtype in enumerate(dtypes):
                self.register_buffer(f"b{index}", torch.zeros(3).to(dtype))

    model = Odd()
    state = {name: torch.ones(tensor.shape).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    load_into(model, write(state, tmp_path, kind))
    assert_same_bits(model.state_dict(), state)


def test_numpy_arrays_are_as_good_as_tensors(tmp_path):
    model, state = fresh(), small_network().state_dict()
    load_into(model, save({name: tensor.numpy() for name, tensor in state.items()}, tmp_path / "a.pt"))
    assert_same_bits(model.state_dict(), state)


def test_the_state_dict_that_fits_best_is_taken(tmp_path):
    model, state = fresh(), small_network().state_dict()
    others = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "ema": {"1.weight": torch.ones(8)}}
    load_into(model, save(others | {"model": state}, tmp_path / "a.pt"))
    assert_same_bits(model.state_dict(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.bias": None}, "no 1.bias"),
        ({"9.bias": torch.ones(1)}, "an unexpected 9.bias"),
        ({"1.bias": torch.ones(7)}, "1.bias of shape (7,) instead of (8,)"),
        ({"1.bias": torch.ones(8).to_sparse()}, "1.bias stored as torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(tmp_path, changes, message):
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: value for name, value in (small_network().state_dict() | changes).items() if value is not None}
    path = save(state, tmp_path / "a.pt")
    with pytest.raises(UsageError) as error:
        load_into(model, path)
    assert str(error.value) == f"{path}: state dict must fit the model, got {message}."
    assert_same_bits(model.state_dict(), before)


def test_counters_may_be_missing(tmp_path):
    state = {name: value for name, value in small_network().state_dict().items() if "num_batches" not in name}
    load_into(fresh(), save(state, tmp_path / "a.pt"))


def refused(kind, path):
    with pytest.raises(kind) as error:
        load_into(fresh(), path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_whole_model_is_loaded_too_and_written_as_its_state_dict(tmp_path):
    path, source, model = tmp_path / "a.pt", small_network(), fresh()
    torch.save({"model": source}, path)
    file = load_into(model, path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    file.require_rewritable(".safetensors")
    with pytest.raises(UsageError, match=r"Write its state dict alone: --output PATH\.safetensors"):
        file.require_rewritable(".pt")


def test_files_that_hold_no_state_dict(tmp_path):
    path = tmp_path / "a.pt"
    assert refused(UnreadableFile, path) == "file must be readable, got: no such file or directory."
    torch.save(torch.nn.ReLU(), path)
    assert "got a pickled module (torch.nn.modules.activation.ReLU)" in refused(PickledModule, path)
    assert refused(UsageError, save({"epoch": 1}, path)) == "file must hold a state dict, got none."
    data = save(small_network().state_dict(), path).read_bytes()
    path.write_bytes(data[:500])
    assert refused(DamagedFile, path).startswith("file must be a whole checkpoint, got a damaged one")
    path.write_bytes(b"\x08\x07")
    message = "file must be a checkpoint (torch.save or safetensors), got an ONNX model."
    assert refused(NotACheckpoint, path) == message


def test_a_malicious_file_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "mark",))

    path = save({"bomb": Bomb(), "model": small_network().state_dict()}, tmp_path / "a.pt")
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists(), "the payload must be live, or this test proves nothing"
    (tmp_path / "mark").unlink()
    load_into(fresh(), path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_is_written_again_with_every_other_bit_kept(tmp_path, legacy):
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in small_network().state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.randn(3).bfloat16()}}, "lr": 0.1}
    content = {"epoch": 7, "nets": [collections.OrderedDict(state)], "optimizer": optimizer}
    path = save(content, tmp_path / "a.pt", legacy=legacy)
    new = torch.arange(8.0, dtype=torch.float64)
    data = load_into(fresh(), path).rewritten({"1.running_mean": new}, {"4.bias"}, suffix=".pt")
    assert (data[:2] == b"PK") is not legacy
    (tmp_path / "b.pt").write_bytes(data)
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (written["epoch"], written["optimizer"]["lr"]) == (7, 0.1)
    assert_same_bits(written["optimizer"]["state"][0], optimizer["state"][0])
    expected = state | {"_orig_mod.module.1.running_mean": new.float()}
    del expected["_orig_mod.module.4.bias"]
    assert_same_bits(written["nets"][0], expected)


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, ".safetensors") for kind in KINDS), ("safetensors", ".pt"), ("safetensors", "")]
)
def test_the_state_dict_alone_is_written_bit_by_bit(tmp_path, kind, suffix):
    model = fresh().bfloat16()
    state = {f"model.{name}": tensor for name, tensor in small_network().bfloat16().state_dict().items()}
    state["model.0.bias"].view(torch.int16)[0] = 0x7FC5
    file = load_into(model, write(state, tmp_path, kind))
    file.require_rewritable(suffix)
    (tmp_path / f"b{suffix}").write_bytes(file.rewritten({"1.bias": torch.ones(8)}, (), suffix=suffix))
    load = load_file if suffix == ".safetensors" else torch.load
    expected = state | {"model.1.bias": torch.ones(8, dtype=torch.bfloat16)}
    assert_same_bits(load(tmp_path / f"b{suffix}"), expected)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_file_with_foreign_objects_is_not_written_again_without_them(tmp_path, kind):
    path = write(small_network().state_dict(), tmp_path, kind)
    file = load_into(fresh(), path)
    for call in (lambda: file.require_rewritable(".pt"), lambda: file.rewritten({}, (), suffix=".pt")):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == (
            f"{path}: file must hold tensors and plain data only to be written again, got what "
            "torch.load(weights_only=True) refuses. Write its state dict alone: --output PATH.safetensors."
        )
    file.require_rewritable(".safetensors")


def test_the_bytes_and_not_the_name_decide_the_format(tmp_path):
    state = small_network().state_dict()
    save_file(state, tmp_path / "a.pt", {"author": "someone"})
    model = fresh()
    file = load_into(model, tmp_path / "a.pt")
    assert_same_bits(model.state_dict(), state)
    (tmp_path / "b.safetensors").write_bytes(file.rewritten({}, (), suffix=".safetensors"))
    with safe_open(tmp_path / "b.safetensors", "pt") as written:
        assert written.metadata() == {"author": "someone"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_a_state_dict_as_a_file(tmp_path, suffix):
    state = small_network().state_dict() | {"view": torch.arange(6.0).reshape(2, 3).T}
    path = tmp_path / f"a{suffix}"
    path.write_bytes(state_dict_file(state, suffix))
    assert_same_bits(load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True), state)


def write_several(state, folder, kind):
    """Write a network over several files, and return the path that stands for them."""
    if kind == "distributed":
        dcp.save(state, checkpoint_id=folder / "saved")
        return folder / "saved"
    if kind == "ranks":
        return save_ranks(state, folder)[0]
    names = list(state)
    files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


several = pytest.mark.parametrize("kind", ["distributed", "ranks", "index"])


@several
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_network_over_several_files_is_loaded_bit_by_bit(tmp_path, kind):
    model, trained = fresh(), small_network().state_dict()
    load_into(model, write_several(trained, tmp_path, kind))
    assert_same_bits(model.state_dict(), trained)


@several
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_network_over_several_files_is_written_as_one(tmp_path, kind, suffix):
    trained = small_network().state_dict()
    file = load_into(fresh(), write_several(trained, tmp_path, kind))
    path = tmp_path / f"new{suffix}"
    changed = {"1.running_mean": torch.full((8,), 7.0)}
    path.write_bytes(file.rewritten(changed, ["1.num_batches_tracked"], suffix=suffix))
    wanted = trained | changed
    del wanted["1.num_batches_tracked"]
    assert_same_bits(load_file(path) if suffix == ".safetensors" else torch.load(path), wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_lies_beside_a_state_dict_in_several_files_is_not_dropped_silently(tmp_path):
    state = {"model": small_network().state_dict(), "ema": {"beta": torch.ones(3)}}
    file = load_into(fresh(), write_several(state, tmp_path, "distributed"))
    with pytest.raises(UsageError, match=r"--output PATH\.safetensors"):
        file.require_rewritable(".pt")
    file.require_rewritable(".safetensors")
