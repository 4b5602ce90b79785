"""The index of Hugging Face libraries: one network over several files of safetensors or torch.save."""

import json

import numpy as np
import pytest
from safetensors.torch import save_file
from tests.samples import save, state_dict

from bnlab.errors import BnlabError, DamagedFile, IncompleteFile, TooMuchWork
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files import sharded_index
from bnlab.observe.files.checkpoint import read_checkpoint, read_stored
from bnlab.observe.files.sharded_index import is_index, read_index

STATE = state_dict("bn1", "layer1.bn")


def write(folder, state=STATE, *, suffix="safetensors", name="model", shards=2):
    """Write a state dict as Hugging Face libraries do, with every layer in two files."""
    weight_map = {}
    for n in range(shards):
        part = dict(list(state.items())[n::shards])
        file = f"{name}-{n + 1:05}-of-{shards:05}.{suffix}"
        (save_file if suffix == "safetensors" else save)(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    path = folder / f"{name}.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 99}, "weight_map": weight_map}))
    return path


def layers(path):
    evidence = read_checkpoint(path, Hyperparameters())
    return {layer.name: layer for network in evidence.networks for layer in network.layers}, evidence


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin.index.json", True),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", True),
        ("index.json", False),
        (".index.json", False),
        ("config.json", False),
    ],
)
def test_names(name, is_one):
    assert is_index(name) == is_one


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_all_files_are_one_network(tmp_path, suffix, shards):
    read, evidence = layers(write(tmp_path, suffix=suffix, shards=shards))
    assert sorted(read) == ["bn1", "layer1.bn"]
    for name, layer in read.items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(getattr(layer, key), STATE[f"{name}.{key}"].double().numpy())
        assert layer.num_batches_tracked == 1000
    assert not evidence.incomplete
    assert not evidence.left_alone


def test_a_network_without_statistics_is_not_opened(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"attention.weight": "missing.safetensors"}}))
    assert read_checkpoint(path, Hyperparameters()).networks == ()


def test_a_missing_file_is_named(tmp_path):
    path = write(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    _, evidence = layers(path)
    assert any("lacks model-00002-of-00002.safetensors" in reason for _, reason in evidence.incomplete)
    with pytest.raises(BnlabError, match="model-00002-of-00002"):
        read_stored(path)


def test_a_tensor_that_is_not_in_its_file_is_named(tmp_path):
    path = write(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["bn9.running_mean"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    read, evidence = layers(path)
    assert evidence.incomplete == (("bn9.running_mean", "is not in model-00001-of-00002.safetensors"),)
    assert len(read) == 2


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(DamagedFile, match=r"index\.json: model-00002-of-00002\.safetensors: file must be"):
        layers(path)


@pytest.mark.parametrize(
    "text",
    [
        *('{"weight_map": {"bn.running_mean": "../a.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}'),
        *('{"weight_map": {"a": 7}}', '{"weight_map": []}', '{"weight_map": {}}', "[]", "7", "", "{", "\x00"),
        *('{"weight_map": {"a": "1", "a": "2"}}', '{"weight_map": {"a": "1"}, "weight_map": {"b": "1"}}'),
        *("[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"weight_map": {"a": null}}', '{"weight_map": {"a": ""}}'),
        *('{"metadata": {"total_size": ' + "9" * 400 + '}, "weight_map": 7}', '{"weight_map": {"mean": "a\\u0000b"}}'),
    ],
)
def test_other_json_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(BnlabError) as error:
        read_checkpoint(path, Hyperparameters())
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_an_index_that_names_itself(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"bn.running_mean": path.name}}))
    with pytest.raises(BnlabError, match="file must be"):
        read_checkpoint(path, Hyperparameters())


def test_an_index_larger_than_that_of_any_network(tmp_path, monkeypatch):
    path = write(tmp_path)
    for limit in ("_MAX_BYTES", "_MAX_SHARDS"):
        with monkeypatch.context() as patch:
            patch.setattr(sharded_index, limit, 1)
            with pytest.raises(TooMuchWork):
                read_index(path)


def test_one_file_alone_says_that_it_is_one_of_several(tmp_path):
    index = write(tmp_path)
    _, evidence = layers(tmp_path / "model-00001-of-00002.safetensors")
    note = f"has the name of one of 2 files of a network: name {index} to check all of them together"
    assert ("", note) in evidence.left_alone
    assert evidence.way_to_the_rest == f"Name all files of the network together: {index}."
    index.unlink()
    _, evidence = layers(tmp_path / "model-00001-of-00002.safetensors")
    assert str(tmp_path / "model-*-of-00002.safetensors") in evidence.way_to_the_rest


def test_the_files_without_an_index(tmp_path):
    write(tmp_path).unlink()
    read, evidence = layers(tmp_path / "model-*-of-00002.safetensors")
    assert sorted(read) == ["bn1", "layer1.bn"]
    assert not evidence.incomplete
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    _, evidence = layers(tmp_path / "model-*-of-00002.safetensors")
    assert ("", "lacks model-00002-of-00002.safetensors") in evidence.incomplete


def test_the_pieces_of_ranks_are_refused(tmp_path):
    pieces = {"0.weight": {"saved_offsets": [0, 0]}}
    file = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file(STATE, file, {"DCP_SHARDING_INFO": json.dumps(pieces), "DCP_VERSION": "1.0"})
    with pytest.raises(IncompleteFile, match="consolidate_safetensors_files"):
        layers(file)


def test_the_index_of_a_variant(tmp_path):
    write(tmp_path, name="model.fp16").rename(tmp_path / "model.safetensors.index.fp16.json")
    _, evidence = layers(tmp_path / "model.fp16-00001-of-00002.safetensors")
    assert "model.safetensors.index.fp16.json" in evidence.way_to_the_rest
