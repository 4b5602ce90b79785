"""Walks through folders. The oracle is the glob of Python where no folder contains itself."""

import glob
import os

import pytest

from bnlab.cli.target_files import Walk, matching


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("a.pt", "b.bin", "x/a.pt", "x/y/c.pt", "x/.hidden/d.pt", ".e.pt", "z/c.pt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tree"


PATTERNS = [
    *("tree/*.pt", "tree/**/*.pt", "**/*.pt", "*/x/*", "tree/**/c.pt", "tree/[xz]/*.pt", "tree/.*", "tree/*/?.pt"),
    *("tree/**/y/*.pt", "tree/x/a.pt", "tree/none/*", "tree/a.pt/*", "tree/**/.hidden/*.pt", "*", "tree/x*/../a.pt"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [True, False])
def test_patterns_match_as_in_python(tree, pattern, absolute):
    pattern = str(tree.parent / pattern) if absolute else pattern
    paths, errors = matching(pattern)
    assert paths == sorted(set(glob.glob(pattern, recursive=True)))  # noqa: PTH207 - the oracle
    assert not errors


def test_two_stars_at_the_end_match_files_and_folders(tree):
    expected = {path.rstrip("/") for path in glob.glob("tree/**", recursive=True)}  # noqa: PTH207 - the oracle
    assert set(matching("tree/**")[0]) == expected


@pytest.fixture
def endless(tree):
    for name in ("loop", "x/loop", "x/y/loop"):
        (tree / name).symlink_to(tree, target_is_directory=True)
    (tree / "self").symlink_to("self")
    (tree / "broken.pt").symlink_to("none")
    return tree


def test_folders_that_contain_themselves_are_entered_once(endless):
    paths, errors = matching("tree/**/*.pt")
    assert paths == ["tree/a.pt", "tree/broken.pt", "tree/x/a.pt", "tree/x/y/c.pt", "tree/z/c.pt"]
    assert not errors
    assert matching("tree/**/**/*.pt")[0] == paths
    assert len(matching("tree/*/*/*/*/*/*/*/*/*.pt")[0]) <= len(paths)


def test_a_folder_behind_a_link_is_entered(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.pt").write_bytes(b"")
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    assert "tree/link/w.pt" in matching("tree/**/*.pt")[0]
    assert "tree/link/w.pt" in matching("tree/*/*.pt")[0]


def test_a_folder_goes_by_its_own_name_rather_than_by_a_link(tree):
    (tree / "latest").symlink_to("x")
    assert [path for path in matching("tree/**/*.pt")[0] if "a.pt" in path] == ["tree/a.pt", "tree/x/a.pt"]


@pytest.mark.parametrize("follows_links", [True, False])
def test_a_walk_has_an_end(endless, follows_links):
    walk = Walk(follows_links=follows_links)
    folders = [folder for folder, _ in walk.folders("tree")]
    assert sorted(folders) == ["tree", "tree/x", "tree/x/.hidden", "tree/x/y", "tree/z"]
    assert list(walk.folders("tree")) == []


def test_a_folder_that_cannot_be_read_is_one_error(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("y"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    paths, errors = matching("tree/**/*.pt")
    assert paths == ["tree/a.pt", "tree/x/a.pt", "tree/z/c.pt"]
    assert [str(error) for error in errors] == ["tree/x/y: folder must be readable, got: permission denied."]
