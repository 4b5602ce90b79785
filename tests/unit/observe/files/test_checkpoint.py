import os
import pickle
import socket
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.samples import on_device, rewrite_zip, save, small_network, state_dict, with_pickle
from torch import nn

from bnlab.errors import BnlabError, DamagedFile, NotACheckpoint, PickledModule, UnreadableFile
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import looks_like_checkpoint, named_errors, read_checkpoint


def read(path):
    return read_checkpoint(path, Hyperparameters())


@pytest.mark.parametrize("suffix", ["", ".pt", ".pth", ".bin", ".tar", ".ckpt", ".th", ".anything"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_bytes_decide_the_format(tmp_path, kind, suffix):
    path, state = tmp_path / f"model{suffix}", small_network().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        save({"state_dict": state}, path, legacy=kind == "legacy")
    assert looks_like_checkpoint(path)
    (network,) = read(path).networks
    assert {layer.name: layer.channels for layer in network.layers} == {"1": 8, "4": 4}
    for layer in network.layers:
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(getattr(layer, key), state[f"{layer.name}.{key}"].double().numpy())


def test_all_formats_give_the_same_evidence(tmp_path):
    state = small_network().state_dict()
    save(state, tmp_path / "a.pt")
    save(state, tmp_path / "b.pt", legacy=True)
    save_file(state, tmp_path / "c.safetensors")
    save(state, tmp_path / "d.pt", protocol=5)
    on_device(save(state, tmp_path / "e.pt"), "cuda:2")
    on_device(save(state, tmp_path / "f.pt", legacy=True), "mps")
    seen = [
        [(layer.name, layer.running_var.tolist(), layer.num_batches_tracked) for layer in read(path).networks[0].layers]
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(seen) == 6
    assert all(sorted(layers) == sorted(seen[0]) for layers in seen)


def test_nothing_is_left_open_or_locked(tmp_path):
    path = save(state_dict("bn"), tmp_path / "a.pt")
    before = open_files()
    read(path)
    assert open_files() == before


def open_files():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def error(path, kind):
    with pytest.raises(kind) as err:
        read(path)
    text = str(err.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    assert isinstance(err.value, BnlabError)
    return text.removeprefix(f"{path}: ")


NOT_ONE = "file must be a checkpoint (torch.save, safetensors, ONNX, NumPy, Keras or Flax), got "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file must be a checkpoint, got an empty file."),
        (b"hello", NOT_ONE + "something else."),
        (bytes(range(130, 230)), NOT_ONE),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", NOT_ONE + "a Git LFS pointer."),
        (b"<!DOCTYPE html><html>404</html>", NOT_ONE + "an HTML page."),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert error(path, NotACheckpoint).startswith(message)


def test_a_tar_archive(tmp_path):
    path = tmp_path / "model.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(save(state_dict("bn"), tmp_path / "a.pt"))
    assert "tar archive. Unpack it" in error(path, NotACheckpoint)


def test_a_zip_archive_of_something_else(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "text")
    assert "zip archive that torch.save did not write" in error(path, NotACheckpoint)


def test_programs_and_pickles_without_torch_are_read_by_their_bytes(tmp_path):
    model = small_network().eval()
    expected = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3, 9, 9),)), tmp_path / "program.pt2")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps(model.state_dict()))
    (tmp_path / "whole.pkl").write_bytes(pickle.dumps(model))
    for path in tmp_path.iterdir():
        path = path.rename(path.with_suffix(""))
        assert [layer.name for layer in read(path).networks[0].layers] == expected


def test_what_joblib_writes_is_named(tmp_path):
    joblib = pytest.importorskip("joblib")
    joblib.dump({"bn.running_mean": np.zeros(300), "bn.running_var": np.ones(300)}, tmp_path / "model.pkl")
    assert "got an object that joblib pickled" in error(tmp_path / "model.pkl", NotACheckpoint)


def test_missing_files_and_folders(tmp_path):
    assert error(tmp_path / "none.pt", UnreadableFile) == "file must be readable, got: no such file or directory."
    assert "regular file" in error(tmp_path, UnreadableFile)
    assert "readable" in error(tmp_path / "a\0b.pt", UnreadableFile)


@pytest.mark.skipif(os.name != "posix", reason="pipes and sockets of POSIX")
def test_pipes_and_sockets_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in error(tmp_path / "pipe", UnreadableFile)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert error(tmp_path / "s", UnreadableFile)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = save(state_dict("bn"), tmp_path / "a.pt")
    path.chmod(0)
    assert error(path, UnreadableFile) == "file must be readable, got: permission denied."


def test_permission_denied_with_the_message_of_the_system(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = save(state_dict("bn"), tmp_path / "a.pt")
    monkeypatch.setattr(os, "open", refuse)
    assert error(path, UnreadableFile) == "file must be readable, got: permission denied."


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, kind, share):
    path, state = tmp_path / "model", state_dict("bn1", "bn2")
    save_file(state, path) if kind == "safetensors" else save(state, path, legacy=kind == "legacy")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = error(path, DamagedFile)
    assert message.startswith("file must be a whole checkpoint, got a damaged one: ")
    assert message.endswith(". Copy or download it again.")
    assert kind != "zip" or "the file is cut off" in message


def test_a_corrupt_safetensors_header(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 20) + b'{"a": {"dtype": nope}}')
    assert error(path, DamagedFile).startswith("file must be a whole checkpoint, got a damaged one: ")


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(tmp_path, record):
    path = save({"bn.running_mean": torch.ones(3), "bn.running_var": torch.ones(3)}, tmp_path / "model.pt")
    rewrite_zip(
        path,
        lambda name, data: bytes(300 << 20) if name.endswith(record) else data,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 1 << 20
    assert "to 314572800 bytes" in error(path, DamagedFile)


def test_a_compression_torch_never_uses(tmp_path):
    path = save(state_dict("bn"), tmp_path / "model.pt")
    rewrite_zip(path, lambda _, data: data, compression=zipfile.ZIP_LZMA)
    assert "compressed in a way torch never does" in error(path, DamagedFile)


def test_a_tensor_that_claims_more_channels_than_it_has_bytes(tmp_path):
    huge = {"bn.running_mean": torch.zeros(1).expand(10**8), "bn.running_var": torch.ones(1).expand(10**8)}
    evidence = read(save(huge, tmp_path / "model.pt"))
    assert evidence.networks == ()
    assert evidence.left_alone == (("bn", "running_mean has the shape (100000000,), not the (C,) of a BN layer"),)


def test_onnx_under_another_name(tmp_path):
    pytest.importorskip("onnx")
    from tests.unit.observe.files.test_onnx_file import batch_norm, initializers, write

    path = write(tmp_path / "m.onnx", [batch_norm()], initializers())
    for name in ("m.bin", "m", "m.ckpt"):
        assert [layer.name for layer in read(path.rename(tmp_path / name)).networks[0].layers] == ["bn"]
        path = tmp_path / name
    save(state_dict("bn"), tmp_path / "torch.onnx")
    assert len(read(tmp_path / "torch.onnx").networks) == 1


def test_a_file_too_large_for_protobuf(tmp_path):
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(b"\x08\x08")
        file.truncate(3 << 30)
    assert "too large for an ONNX model" in error(path, NotACheckpoint)


def test_a_pickled_module(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.BatchNorm2d(3, eps=0.5)), path)
    (layer,) = read(path).networks[0].layers
    assert (layer.name, layer.channels, layer.hyperparameters.eps) == ("0", 3, 0.5)
    torch.save(nn.Sequential(nn.ReLU()), path)
    assert "got a pickled module (torch.nn.modules.container.Sequential) without a tensor" in error(path, PickledModule)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    command = f"touch {mark}".encode()
    payload = b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R."
    os.system(command.decode())
    assert mark.exists(), "the payload must be live, or this test proves nothing"
    mark.unlink()
    path = with_pickle(save(state_dict("bn"), tmp_path / "a.pt"), payload)
    assert read(path).networks == ()
    assert not mark.exists()


def test_a_parser_that_breaks_in_an_unforeseen_way_is_still_an_error_for_the_user(tmp_path):
    # a state dict with a shape that is a string, which no writer produces
    path = save({"bn.running_mean": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    damaged = pickled.replace(b"K\x03\x85", b"NK\x03\x86", 1)
    assert damaged != pickled
    error(with_pickle(path, damaged), DamagedFile)


def test_an_error_is_one_line_of_bounded_length(tmp_path):
    with pytest.raises(NotACheckpoint) as caught, named_errors(tmp_path):
        raise NotACheckpoint("a\n\x1b[2Jb " + "c" * 10_000_000)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: a\\n\\x1b[2Jb cc")
    assert message.isprintable()
    assert len(message) < 5_000
