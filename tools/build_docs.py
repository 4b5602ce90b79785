"""Writes the generated pages of the docs: one page per check, and their index. `make docs` runs this file."""

from __future__ import annotations

import re
from pathlib import Path

from bnlab.checks import CHECKS

DOCS = Path(__file__).parents[1] / "docs"
NOTICE = "<!-- Generated from the check's own file by tools/build_docs.py; do not edit. -->\n"
INTRODUCTION = (
    "`bnlab check` runs these checks. Run one with `--select BN102`, and accept its findings with",
    "`--ignore BN102=REASON`. Only errors and warnings change the exit code.",
)


def pages() -> dict[Path, str]:
    """Return all generated pages by path."""
    rows = [
        f"| [{check.code}]({check.code}.md) | {check.name} | {check.group.level.value} | {check.title} |"
        for check in CHECKS
    ]
    head = ["# The checks", "", *INTRODUCTION, "", "| code | name | level | what it looks for |", "|---|---|---|---|"]
    index = "\n".join([NOTICE, *head, *rows, ""])
    built = {DOCS / "checks" / "README.md": index}
    for check in CHECKS:
        source = Path("src", *type(check).__module__.split(".")).with_suffix(".py")
        built[DOCS / "checks" / f"{check.code}.md"] = (
            f"{NOTICE}\n{linked(check.page)}\n[Source](../../{source.as_posix()}) · [all checks](README.md)\n"
        )
    return built


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def linked(page: str) -> str:
    """Turn references such as `docs/background.md, "Small counts"` or `docs/lab.md` into links.

    Checks hold them as text, which reads well in a terminal.
    """

    def link(reference: re.Match[str]) -> str:
        name, heading = reference["name"], reference["heading"]
        if heading is None:
            return f"[docs/{name}](../{name})"
        heading = " ".join(heading.split())
        return f'[docs/{name}, "{heading}"](../{name}#{anchor(heading)})'

    return re.sub(r'\bdocs/(?P<name>\w+\.md)(?:,\s+"(?P<heading>[^"]+)")?', link, page)


def main() -> None:
    """Write the pages, and remove the pages of checks that no longer exist."""
    built = pages()
    (DOCS / "checks").mkdir(parents=True, exist_ok=True)
    for old in (DOCS / "checks").glob("*.md"):
        if old not in built:
            old.unlink()
    for path, text in built.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
