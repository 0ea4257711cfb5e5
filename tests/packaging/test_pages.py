"""README, docs/ and the pages of benchmarks/: commands and options that are there, links that lead
somewhere, figures out of results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import deltaops
from deltaops.cli import app
from deltaops.strategy import parse_parts
from deltaops.tuning.spec import parse_delta

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
GUIDES = (*PAGES, *sorted((ROOT / "benchmarks").glob("**/README.md")))


def commands(page: Path) -> list[str]:
    """Of the shell blocks, without comments and lines that go on with one."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    whole = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in whole.splitlines()]
    return [line for line in lines if line]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_readme_begins_with_the_two_commands() -> None:
    assert commands(README)[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
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
            options_exist(command)


def options_exist(command: str) -> None:
    """Of a command of deltaops; what they name by words of ours is looked at, too."""
    found, (_, *words) = get_command(app), shlex.split(command)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    known = {name for option in found.params for name in (*option.opts, *option.secondary_opts)}
    for word, value in zip(words, [*words[1:], ""], strict=False):
        assert not word.startswith("--") or word in known, command
        if word == "--delta":
            parse_delta(value)
        if word == "--controller":
            parse_parts(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_python_exist(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    homes: dict[str, Any] = {"deltaops": deltaops}
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name == "deltaops.jax":
                    pytest.importorskip("jax")
                if name.name.startswith("deltaops."):
                    homes[name.asname or "deltaops"] = importlib.import_module(name.name)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("deltaops"):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home = homes.get(node.value.id)
            assert home is None or hasattr(home, node.attr), f"{node.value.id}.{node.attr}"


def test_the_table_of_methods_has_specs_that_are_read() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    specs = [row[1].strip("`") for row in rows(text)[2:]]
    assert len(specs) > 15
    for spec in specs:
        parse_delta(spec)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
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


def test_figures_are_those_of_the_reports_that_are_named() -> None:
    section = README.read_text(encoding="utf-8").split("## How fast")[1]
    reports = re.findall(r"\[(Zen \d)\]\((.+?)\)", section)
    head, _, *quoted = rows(section.split("\n## ")[0])
    assert quoted
    for machine, report in reports:
        there = rows((ROOT / report).read_text(encoding="utf-8"))
        column = head.index(machine)
        for goal, dtype, limit, *figures in quoted:
            value, outcome = figures[column - 3 : column - 1]
            found = [row for row in there if row[:2] == [goal, dtype]]
            assert [[row[2], *row[4:6]] for row in found] == [[value, limit, outcome]], (
                f"README's How fast must have {machine}'s row {found} of {goal} in {dtype}"
            )
    assert [name for name, _ in reports] == [name for name in head[3:] if name]


def test_figures_of_a_gpu_are_those_of_its_run() -> None:
    section = README.read_text(encoding="utf-8").split("## How fast")[1]
    (page,) = re.findall(r"\[all cases and goals\]\((.+?)\)", section)
    said = re.findall(r"\d\.\d\d", section.partition("On one H200")[2].partition("([all")[0])
    run = json.loads((ROOT / page).with_suffix(".json").read_text(encoding="utf-8"))
    every = ("deltaops", "PEFT", "PEFT compiled")
    found = []
    for tokens, rank, dropout, peers in (
        *((tokens, 16, 0.0, every) for tokens in (8192, 1)),
        *((8192, *settings, every[:1]) for settings in ((64, 0.0), (16, 0.1))),
    ):
        (case,) = [
            one["seconds"]
            for one in run["delta_linear"]
            if (one["shape"], one["rank"], one["dropout"]) == ([tokens, 4096, 4096], rank, dropout)
        ]
        found += [f"{case[p]['median'] / case['frozen']['median']:.2f}" for p in peers]
    assert said == found


def rows(text: str) -> list[list[str]]:
    """Of Markdown's tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
