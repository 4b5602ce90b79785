"""The guides for contributors name what exists, and their examples work."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "contributing").glob("*.md"))
PAGES = [*GUIDES, ROOT / "docs" / "architecture.md", ROOT / "docs" / "compatibility.md"]
PAGES += [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")]

WORKED_EXAMPLE = {"bn199_shut_channel.py", "BN199.md"}
"""Files that exist only while a reader follows docs/contributing/new-check.md."""

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def test_there_is_a_guide_for_each_kind_of_part():
    names = {path.stem for path in GUIDES}
    assert names == {"new-check", "new-remedy", "new-layer", "new-experiment", "new-backend"}


@every_page
def test_files_that_are_named_exist(path):
    """A path is looked up below the project, the package and the tests; one with <name> or * stands for several."""
    roots = (ROOT, ROOT / "src" / "bnlab", ROOT / "tests", ROOT / "tests" / "unit")
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|yml)|[\w-]+(?:/[\w-]+)*/)`", path.read_text(encoding="utf-8")):
        if Path(name).name not in WORKED_EXAMPLE:
            assert any((root / name).exists() or any(root.rglob(name)) for root in roots), name


@every_page
def test_targets_of_make_exist(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", path.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target


def test_the_project_says_how_it_is_cited_and_which_version_it_is():
    from bnlab import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_every_version_that_is_promised():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        assert f'"{version}"' in workflow
    for version in ("2.10", "2.11", "2.12", "2.13", "newest"):
        assert f'"{version}"' in workflow
