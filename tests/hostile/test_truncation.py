"""A file that somebody truncates while it is read ends in one line, never in a signal or another exception."""

import os
import shutil

import pytest
from tests.hostile.corpus import write_corpus
from tests.hostile.fuzz import read

from bnlab.observe.files import content

pytestmark = pytest.mark.hostile

FORMATS = (
    "zip",
    "legacy",
    "module",
    "safetensors",
    "safetensors index",
    "numpy pickle",
    "npz",
    "Flax",
    "ONNX",
    "Keras h5",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return {sample.name: sample for sample in write_corpus(tmp_path_factory.mktemp("truncated"))}


@pytest.mark.parametrize("name", FORMATS)
def test_file_that_is_truncated_while_it_is_read(corpus, tmp_path, monkeypatch, name):
    if name not in corpus:
        pytest.skip("the writer of this format is not installed")
    sample, read_at, ends = corpus[name], content._read_at, set()
    for moment in (1, 2, 3, 5, 8):
        folder = tmp_path / str(moment)
        shutil.copytree(sample.folder, folder)
        calls = 0

        def truncating(*arguments):
            nonlocal calls
            calls += 1
            if calls == moment:  # noqa: B023 - called before the next moment
                for file in folder.iterdir():  # noqa: B023
                    os.truncate(file, file.stat().st_size // 3)
            return read_at(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(content, "_read_at", truncating)
            end = read(folder, sample.target)
        # Where nothing is read after the cut, the file is read, and the guard reports the cut of this test.
        assert not end.is_failure or "os.truncate" in end.detail, end
        ends.add(end.name)
    assert ends - {"read", "misdeed"}, "at least one moment must matter"
