"""Writes the pages that come from the code: one per check, and their index. `make docs` runs it."""

from __future__ import annotations

from pathlib import Path

from bnlab.checks import CHECKS

DOCS = Path(__file__).parents[1] / "docs"
NOTICE = "<!-- Generated from the check's own file by tools/build_docs.py; do not edit. -->\n"


def pages() -> dict[Path, str]:
    """Return every generated page by its path."""
    rows = [
        f"| [{check.code}]({check.code}.md) | {check.name} | {check.group.level.value} | {check.title} |"
        for check in CHECKS
    ]
    head = ["# The checks", "", "| code | allow ... | level | what it looks for |", "|---|---|---|---|"]
    index = "\n".join([NOTICE, *head, *rows, ""])
    built = {DOCS / "checks" / "README.md": index}
    for check in CHECKS:
        source = Path("src", *type(check).__module__.split(".")).with_suffix(".py")
        built[DOCS / "checks" / f"{check.code}.md"] = (
            f"{NOTICE}\n{check.page}\n[Source](../../{source.as_posix()}) · [all checks](README.md)\n"
        )
    return built


def main() -> None:
    """Write the pages and remove those of checks that are gone."""
    built = pages()
    (DOCS / "checks").mkdir(parents=True, exist_ok=True)
    for old in (DOCS / "checks").glob("*.md"):
        if old not in built:
            old.unlink()
    for path, text in built.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
