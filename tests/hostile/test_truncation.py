"""A file that somebody truncates while it is read ends in one line, never in a signal or another exception."""

import os
import shutil

import pytest
from tests.hostile.fuzz import read
from tests.hostile.guard import unwatched

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


@pytest.mark.parametrize("name", FORMATS)
def test_file_that_is_truncated_while_it_is_read(sample, tmp_path, monkeypatch):
    read_at, ends = content._read_at, set()
    for moment in (1, 2, 3, 5, 8):
        folder = tmp_path / str(moment)
        shutil.copytree(sample.folder, folder)
        calls = 0

        def truncating(*arguments):
            nonlocal calls
            calls += 1
            if calls == moment:  # noqa: B023 - called before the next moment
                with unwatched():
                    for file in folder.iterdir():  # noqa: B023
                        os.truncate(file, file.stat().st_size // 3)
            return read_at(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(content, "_read_at", truncating)
            end = read(folder, sample.target)
        assert not end.is_failure, end
        ends.add(end.name)
    assert ends - {"read"}, "at least one moment must matter"
