"""README and docs/: commands that are there, links that lead somewhere, figures out of results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


def commands(page: Path) -> list[str]:
    """Of the shell blocks, without comments and lines that go on with one."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for line in "\n".join(blocks).splitlines()]
    return [line for line in lines if line]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_readme_begins_with_the_two_commands() -> None:
    assert commands(README)[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    known = {path.stem for path in (ROOT / "deltaops" / "cli").glob("*.py")}
    for command in commands(page):
        program, _, rest = command.partition(" ")
        if program == "make":
            assert rest.split()[0] in targets, command
        if program == "deltaops":
            assert rest.split()[0].replace("-", "_") in known, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("https:"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_figures_are_those_of_the_report_that_is_named() -> None:
    section = README.read_text(encoding="utf-8").split("## How fast")[1]
    (report,) = re.findall(r"\[report\]\((.+?)\)", section)
    there = rows((ROOT / report).read_text(encoding="utf-8"))
    quoted = rows(section.split("\n## ")[0])[2:]
    assert quoted
    for goal, dtype, value, limit, outcome in quoted:
        found = [row for row in there if row[:2] == [goal, dtype]]
        assert [[row[2], *row[4:6]] for row in found] == [[value, limit, outcome]], (
            f"README's How fast must have the report's row {found} of {goal} in {dtype}"
        )


def rows(text: str) -> list[list[str]]:
    """Of Markdown's tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
