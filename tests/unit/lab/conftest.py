"""What the tests of the lab share."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder that is searched and may hold anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inside = tmp_path / "sets"
    inside.mkdir()
    monkeypatch.setenv("BNLAB_DATA", str(inside))
    return inside
