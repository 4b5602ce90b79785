"""Files whose names differ in one number."""

from pathlib import Path

import pytest
import torch
from tests.samples import save, state_dict

from bnlab.observe.files.checkpoint import read_stored
from bnlab.observe.files.numbered_files import are_one_network, files_of, pattern_of, stated_count


def read(path):
    return read_stored(path).tree


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model-00001-of-00003.safetensors", "model-*-of-00003.safetensors"),
        ("pytorch_model-00002-of-00002.bin", "pytorch_model-*-of-00002.bin"),
        ("step_100_rank_3.pt", "step_100_rank_*.pt"),
        ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_*.pt"),
        ("rank_0_epoch_7.pt", "rank_*_epoch_7.pt"),
        ("rank0.pt", "rank*.pt"),
        ("0.pt", "*.pt"),
        ("shard-00001-model-00001-of-00001.safetensors", "shard-*-model-00001-of-00001.safetensors"),
        ("model.pt", None),
        ("rank*.pt", None),
        ("a*1.pt", None),
    ],
)
def test_the_number_of_the_part(name, pattern):
    assert pattern_of(Path("folder", name)) == (None if pattern is None else Path("folder", pattern))


def test_names_that_state_their_count():
    assert stated_count(Path("a-1-of-00012.pt")) == 12
    assert stated_count(Path("a-1-of-1.pt")) is None
    assert stated_count(Path("rank0.pt")) is None


def test_the_files_behind_a_pattern(tmp_path):
    for number in (10, 9, 0):
        (tmp_path / f"rank{number}.pt").write_bytes(b"x")
    for name in ("rank.pt", "rankx.pt", "rank1.pt.old", "other1.pt"):
        (tmp_path / name).write_bytes(b"x")
    files = files_of(tmp_path / "rank*.pt")
    assert [path.name for path in files.paths.values()] == ["rank0.pt", "rank9.pt", "rank10.pt"]
    assert files.count is None
    assert files.missing == []
    for pattern in ("none*.pt", "rank0.pt", "*a*.pt", "none/*.pt"):
        assert files_of(tmp_path / pattern) is None


def test_missing_files_are_named(tmp_path):
    (tmp_path / "m-00002-of-00003.bin").write_bytes(b"x")
    assert files_of(tmp_path / "m-*-of-00003.bin").missing == ["m-00001-of-00003.bin", "m-00003-of-00003.bin"]
    (tmp_path / "m-0-of-3.bin").write_bytes(b"x")
    assert files_of(tmp_path / "m-*-of-3.bin").missing == ["m-1-of-3.bin", "m-2-of-3.bin"]
    (tmp_path / "m-1-of-999999999.bin").write_bytes(b"x")
    assert files_of(tmp_path / "m-*-of-999999999.bin").missing == []


def test_what_is_one_network(tmp_path):
    halves = [save({f"{name}.weight": torch.ones(3)}, tmp_path / f"m-{name}-of-2.pt") for name in (1, 2)]
    assert are_one_network(halves, read)
    folds = [save({"net": state_dict("bn")}, tmp_path / f"fold-{n}-of-2.pt") for n in (1, 2)]
    assert not are_one_network(folds, read)
    epochs = [save(state_dict("bn"), tmp_path / f"epoch_{n}.pt") for n in (1, 2)]
    assert not are_one_network(epochs, read)
