"""Damaged files of every format end in evidence, or in one line that begins with the path."""

import importlib
import itertools
import os
import pickle
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from tests.hostile.corpus import Sample, write_corpus
from tests.hostile.fuzz import REGRESSIONS, End, read, run_case, warm_up
from tests.hostile.guard import Misdeed, TooSlow, guarded

SEEDS = 100
pytestmark = pytest.mark.hostile

NAMES = list(write_corpus.__globals__["_WRITERS"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return {sample.name: sample for sample in write_corpus(tmp_path_factory.mktemp("corpus"))}


def sample_of(corpus, name):
    if name not in corpus:
        pytest.skip("the writer of this format is not installed")
    return corpus[name]


@pytest.mark.parametrize("name", NAMES)
def test_honest_file(corpus, tmp_path, name):
    sample = sample_of(corpus, name)
    warm_up(sample)
    shutil.copytree(sample.folder, tmp_path / "copy")
    assert read(tmp_path / "copy", sample.target) == End("read")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(corpus, tmp_path, name):
    sample = sample_of(corpus, name)
    ends = {seed: run_case(sample, seed, tmp_path / "case") for seed in range(SEEDS)}
    assert {seed: end for seed, end in ends.items() if end.is_failure} == {}
    names = Counter(end.name for end in ends.values())
    assert names["read"] > 0, "some damage must not matter"
    assert len(names) > 1, "some damage must be noticed"


@pytest.mark.parametrize("folder", sorted(REGRESSIONS.iterdir()) if REGRESSIONS.exists() else [], ids=lambda f: f.name)
def test_file_that_once_failed(folder, tmp_path):
    shutil.copytree(folder / "files", tmp_path / "files")
    target = (folder / "target").read_text()
    warm_up(Sample(folder.name, folder / "files", target))
    end = read(tmp_path / "files", target)
    assert not end.is_failure, end


@pytest.mark.skipif("BNLAB_DATA" not in os.environ, reason="real networks: BNLAB_DATA is not set")
def test_damaged_real_files(tmp_path, data):
    files = [path for path in sorted(data.glob("nets/*/*")) if path.suffix in (".pt", ".pth", ".th", ".safetensors")]
    files += sorted(data.glob("onnx_bn/light/light_resnet50.onnx"))
    assert len(files) >= 9
    for path in files:
        folder = tmp_path / "real" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
        sample = Sample(path.name, folder, path.name)
        failures = [end for end in (run_case(sample, seed, tmp_path / "case") for seed in range(12)) if end.is_failure]
        assert failures == []
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "deed",
    [
        lambda folder: importlib.import_module("hostile_module"),
        lambda folder: os.system("true"),
        lambda folder: Path("/etc/hostname").read_bytes(),
        lambda folder: (folder / "inside").write_text("y"),
        lambda folder: exec("1"),
        lambda folder: pickle.loads(b"cbuiltins\nlist\n."),
    ],
    ids=["import", "system", "open", "write", "exec", "find_class"],
)
def test_guard_notices_a_misdeed(tmp_path, deed):
    with pytest.raises(Misdeed), guarded(tmp_path, 5, 100), suppress(ImportError):
        deed(tmp_path)


def test_guard_allows_to_read_the_file_itself(tmp_path):
    (tmp_path / "inside").write_text("x")
    with guarded(tmp_path, 5, 100):
        assert (tmp_path / "inside").read_text() == "x"


def test_guard_ends_what_takes_long(tmp_path):
    with pytest.raises(TooSlow), guarded(tmp_path, 0.05, 100):
        any(number < 0 for number in itertools.count())


def test_guard_notices_memory(tmp_path):
    with pytest.raises(TooSlow), guarded(tmp_path, 5, 100):
        bytearray(b"x") * (2 << 30)
