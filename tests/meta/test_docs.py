import re
import shlex
from pathlib import Path

import pytest
from tools.build_docs import DOCS, anchor, linked, pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(
        ROOT / f"{name}.md"
        for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY", ".github/PULL_REQUEST_TEMPLATE")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_generated_pages_are_up_to_date():
    built = pages()
    assert {path.name for path in built} == {path.name for path in (DOCS / "checks").glob("*.md")}
    for path, text in built.items():
        assert path.read_text(encoding="utf-8") == text, f"run `make docs`: {path.name} is out of date"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.trains
def test_the_examples_of_the_readme_run_as_written(tmp_path, monkeypatch, capsys, bnlab_command):
    from bnlab.lab.experiments.train_eval import Config, TrainEval

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainEval, "quick", Config(batches=(2, 4), updates=(1, 200)))  # or one command takes seconds
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "bn" not in printed.lower().split()
    assert "accuracy is 0." in printed
    assert "of the gap comes from statistics that were barely updated" in printed
    assert "error BN102 1 running_var is -0.001 in 1 of 8 channels, must be >= 0" in printed
    commands = [shlex.split(line, comments=True)[1:] for block in blocks("console") for line in block.splitlines()]
    assert len(commands) == 10
    for arguments in commands:
        code, out, err = bnlab_command(*arguments)
        assert (code, err) == (1 if arguments[0] == "check" else 0, "")
        assert out or "--output" in arguments


def headings(path):
    """Return the anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, fragment = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not fragment or fragment in headings(target), link


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_and_headings_that_the_code_refers_to_exist(path):
    references = re.findall(r'\b(docs/[\w/]+\.md)(?:,\s+"([^"]+)")?', path.read_text(encoding="utf-8"))
    for page, heading in references:
        assert (ROOT / page).exists(), page
        assert not heading or anchor(" ".join(heading.split())) in headings(ROOT / page), heading


def test_references_in_the_text_of_a_check_become_links():
    assert linked('docs/lab.md; docs/background.md, "Small\ncounts".') == (
        '[docs/lab.md](../lab.md); [docs/background.md, "Small counts"](../background.md#small-counts).'
    )


CLOSED_REFERENCES = (
    r"\b(?:papers|peers|style|design|kernels)\.md\b",
    r"\bF\d+\b[^.;]*\bfailure modes?\b|\bfailure modes?\b[^.;]*\bF\d+\b",
    r"\bF\d+ of\b|; F\d+[.;]",
    r"(?i:\bformulas?) \d+\.\d",
    r"(?<![\w/])(?:\.\./)*shared/\w",
    r"(?i:\b(?:the|this|an) article\b)(?!, paper)|\barticle(?:, A\d|'s program)|(?i:\bclaims?) A\d",
)
"""References to notes that are no part of the repository, as regular expressions."""


def closed_references(text, folder):
    """Return the references in a text that a reader cannot open, each with the words around it.

    Links to existing files relative to the folder are open, and so is docs/kernels.md.
    """

    def without_link(link):
        return "" if (folder / link[1]).exists() else link[0]

    text = re.sub(r"\[[^\]]*\]\(([^)#\s]+)[^)\s]*\)", without_link, " ".join(text.split()))
    text = text.replace("docs/kernels.md", "")
    matches = (match for pattern in CLOSED_REFERENCES for match in re.finditer(pattern, text))
    return [text[max(0, match.start() - 40) : match.end() + 40] for match in matches]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_can_be_opened(path):
    assert closed_references(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize(
    "text",
    [
        "formulas and numbers in papers.md, section 3",
        "kernels.md, section 0, item 2",
        "as design.md\nasks",
        "[the kernels](../missing/kernels.md)",
        "F26 of the failure modes",
        "F11 and F12 of the failure modes",
        "Ioffe 2017; F7.",
        "F9 of\n    the failure modes",
        "formulas 5.4",
        "papers, formula 5.4",
        "measured in ../shared/research",
        "see shared/cases",
        "claim A2 of the article",
        "article, A3 and program 2",
        "the article's program 1",
        "the measured facts about the article",
    ],
)
def test_references_that_cannot_be_opened_are_refused(text):
    assert closed_references(text, ROOT / "docs")


@pytest.mark.parametrize(
    "text",
    [
        "docs/kernels.md says how fast they are",
        "[one kernel](kernels.md), [background](background.md#small-counts)",
        '"F64": "float64", "F32": "float32"',
        "Ioffe and Szegedy 2015, formula 2, section 3.2",
        "The article, paper or thread it comes from.",
        "one shared layer",
        "models have other failure modes",
    ],
)
def test_references_that_can_be_opened_pass(text):
    assert closed_references(text, ROOT / "docs") == []


def test_the_commands_of_the_readme_exist_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
