"""The fixtures of the lab tests."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder of the search that may hold files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = tmp_path / "sets"
    inside.mkdir()
    monkeypatch.setenv("BNLAB_DATA", str(inside))
    return inside
