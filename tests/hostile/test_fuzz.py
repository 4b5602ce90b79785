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
from tests.hostile.corpus import WRITERS, Sample
from tests.hostile.fuzz import REGRESSIONS, End, keep, read, read_kept, run_case, warm_up
from tests.hostile.guard import Misdeed, TooSlow, guarded

SEEDS = 100
pytestmark = pytest.mark.hostile

NAMES = list(WRITERS)


@pytest.mark.parametrize("name", NAMES)
def test_honest_file(sample, tmp_path):
    warm_up(sample)
    shutil.copytree(sample.folder, tmp_path / "copy")
    assert read(tmp_path / "copy", sample.target) == End("read")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(sample, tmp_path):
    ends = {seed: run_case(sample, seed, tmp_path / "case") for seed in range(SEEDS)}
    assert {seed: end for seed, end in ends.items() if end.is_failure} == {}
    names = Counter(end.name for end in ends.values())
    assert names["read"] > 0, "some damage must not matter"
    assert len(names) > 1, "some damage must be noticed"


def test_files_that_once_failed(corpus, tmp_path):
    keep(corpus["zip"], 0, tmp_path / "kept")  # as the fuzzer keeps a file, and there is always one
    kept = [*(tmp_path / "kept").iterdir(), *(sorted(REGRESSIONS.iterdir()) if REGRESSIONS.exists() else [])]
    ends = {folder.name: read_kept(folder, tmp_path / "files") for folder in kept}
    assert ends.pop("zip-0") == run_case(corpus["zip"], 0, tmp_path / "case")
    assert {name: end for name, end in ends.items() if end.is_failure} == {}


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


def test_guard_notices_a_misdeed_before_a_refusal(tmp_path):
    def run_and_refuse():
        os.system("true")
        raise ValueError("refused")

    with pytest.raises(Misdeed), guarded(tmp_path, 5, 100):
        run_and_refuse()


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
