"""Folders of torch.distributed.checkpoint, written by torch."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.ranks import save_distributed, sharded
from tests.samples import state_dict

from bnlab.errors import BnlabError, DamagedFile, NotACheckpoint
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint, read_stored
from bnlab.observe.files.distributed_checkpoint import is_distributed

STATE = state_dict("bn1", "layer1.bn", channels=9)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def layers(path):
    evidence = read_checkpoint(path, Hyperparameters())
    return {layer.name: layer for network in evidence.networks for layer in network.layers}, evidence


def assert_whole(path):
    read, evidence = layers(path)
    assert sorted(read) == ["bn1", "layer1.bn"]
    for name, layer in read.items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(getattr(layer, key), STATE[f"{name}.{key}"].double().numpy())
        assert layer.num_batches_tracked == 1000
    assert not evidence.incomplete


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Return a checkpoint of two ranks, which no test changes."""
    return save_distributed(tmp_path_factory.mktemp("two"), lambda mesh: {"model": sharded(STATE, mesh)})


@pytest.fixture
def copied(two_ranks, tmp_path):
    for file in two_ranks.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_one_process(tmp_path):
    state = {"model": STATE, "epoch": 3, "optimizer": {"groups": [0.1, {"a": torch.ones(2)}]}}
    dcp.save(state, checkpoint_id=tmp_path / "x")
    assert_whole(tmp_path / "x")
    assert_whole(tmp_path / "x" / ".metadata")


def test_two_ranks(two_ranks):
    assert {file.name for file in two_ranks.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert_whole(two_ranks)


def test_every_tensor_is_that_of_torch(two_ranks):
    tree = read_stored(two_ranks).tree["model"]
    assert tree.keys() == STATE.keys()
    for name, value in STATE.items():
        assert np.array_equal(tree[name].read(), value.numpy())


def test_bfloat16_and_a_dtype_without_numbers(tmp_path):
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in STATE.items()}
    dcp.save(state, checkpoint_id=tmp_path / "x")
    read, _ = layers(tmp_path / "x")
    assert read["bn1"].dtype == "bfloat16"
    assert np.array_equal(read["bn1"].running_mean, state["bn1.running_mean"].double().numpy())


def test_a_missing_file_is_named(copied):
    (copied / "__1_0.distcp").unlink()
    read, evidence = layers(copied)
    assert read == {}
    assert ("", "lacks __1_0.distcp") in evidence.incomplete
    assert any(reason == "lacks values 5 to 8 of the 9 of running_mean" for _, reason in evidence.incomplete)
    with pytest.raises(BnlabError, match=r"lacks __1_0\.distcp"):
        read_stored(copied)


def test_a_file_that_is_cut_off_is_named(copied):
    chunks = copied / "__1_0.distcp"
    chunks.write_bytes(chunks.read_bytes()[:3000])
    _, evidence = layers(copied)
    assert ("", "has only the first 3000 bytes of __1_0.distcp") in evidence.incomplete


def test_chunks_that_are_exchanged_are_refused(copied):
    first, second = copied / "__0_0.distcp", copied / "__1_0.distcp"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1].ljust(len(data[0]), b"\0"))
    second.write_bytes(data[0].ljust(len(data[1]), b"\0"))
    with pytest.raises(BnlabError, match=r"__[01]_0\.distcp: file must be a checkpoint"):
        layers(copied)


def test_metadata_that_names_files_elsewhere(copied):
    with (copied / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for name in ("../x.distcp", "/dev/zero"):
        places = {index: replace(place, relative_path=name) for index, place in metadata.storage_data.items()}
        (copied / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=places)))
        with pytest.raises(DamagedFile, match="its own folder"):
            layers(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"storage_data": None},
        {"state_dict_metadata": []},
    ],
)
def test_metadata_that_no_writer_produces(copied, change):
    with (copied / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    (copied / ".metadata").write_bytes(pickle.dumps(replace(metadata, **change)))
    with pytest.raises(DamagedFile) as error:
        layers(copied)
    assert "\n" not in str(error.value)


def test_metadata_without_places(copied):
    with (copied / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    (copied / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data={})))
    _, evidence = layers(copied)
    assert evidence.networks == ()
    assert len(evidence.incomplete) == 2


def test_compressed_chunks_are_refused(copied):
    with (copied / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    places = {i: replace(place, transform_descriptors=["stream.zstd"]) for i, place in metadata.storage_data.items()}
    (copied / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=places)))
    with pytest.raises(NotACheckpoint, match=r"stream\.zstd"):
        layers(copied)


def test_a_part_of_a_checkpoint_is_refused(two_ranks):
    with pytest.raises(NotACheckpoint, match="Name its folder"):
        layers(two_ranks / "__0_0.distcp")


def test_only_the_folder_of_a_checkpoint_is_one(two_ranks, tmp_path):
    assert is_distributed(two_ranks)
    (tmp_path / ".metadata").mkdir()
    assert not is_distributed(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".metadata").write_bytes(b"text")
    assert not is_distributed(tmp_path / "x")
    assert not is_distributed(tmp_path / "none")


def test_torch_is_not_imported(two_ranks):
    code = f"""
import sys
from pathlib import Path
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint
assert len(read_checkpoint(Path({str(two_ranks)!r}), Hyperparameters()).networks[0].layers) == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
