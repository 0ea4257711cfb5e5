"""Draw module paths as a tree, the same layer many times as one line: ``layers.[0-31]``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Leaf(NamedTuple):
    """A line of the tree."""

    path: str
    what: str
    size: str


class _Node:
    def __init__(self) -> None:
        self.leaf: Leaf | None = None
        self.children: dict[str, _Node] = {}

    def shape(self) -> tuple[object, ...]:
        """Equal for subtrees that print the same."""
        own = None if self.leaf is None else (self.leaf.what, self.leaf.size)
        return own, tuple((name, child.shape()) for name, child in self.children.items())


def draw(leaves: Iterable[Leaf]) -> str:
    """One line a leaf, siblings that are numbered and alike folded into one."""
    root = _Node()
    for leaf in leaves:
        node = root
        for part in (leaf.path or "(model)").split("."):
            node = node.children.setdefault(part, _Node())
        node.leaf = leaf
    rows = list(_rows(root, ""))
    width = max((len(label) for label, _ in rows), default=0)
    middle = max((len(leaf.what) for _, leaf in rows if leaf and leaf.size), default=0)
    lines = []
    for label, found in rows:
        text = "" if found is None else f"  {found.what:<{middle}}  {found.size}"
        lines.append(f"{label:<{width}}{text}".rstrip())
    return "\n".join(lines)


def _rows(node: _Node, indent: str) -> Iterator[tuple[str, Leaf | None]]:
    groups = list(_grouped(node))
    for i, (label, child, times) in enumerate(groups):
        last = i == len(groups) - 1
        # a chain of single groups is one line: model.layers.[0-31]
        while times == 1 and child.leaf is None and len(inner := list(_grouped(child))) == 1:
            suffix, child, times = inner[0]
            label = f"{label}.{suffix}"
        leaf = child.leaf
        if leaf is not None and times > 1:
            leaf = leaf._replace(size=f"{leaf.size} × {times}" if leaf.size else "")
        mark = f" (× {times})" if times > 1 and child.leaf is None else ""
        yield f"{indent}{'└─ ' if last else '├─ '}{label}{mark}", leaf
        yield from _rows(child, indent + ("   " if last else "│  "))


def _grouped(node: _Node) -> Iterator[tuple[str, _Node, int]]:
    """Children in order; neighbours with consecutive numbers that look alike join."""
    run: list[tuple[str, _Node]] = []
    for name, child in node.children.items():
        if run and not (
            name.isdigit()
            and run[-1][0].isdigit()
            and int(name) == int(run[-1][0]) + 1
            and child.shape() == run[-1][1].shape()
        ):
            yield _joined(run)
            run = []
        run.append((name, child))
    if run:
        yield _joined(run)


def _joined(run: list[tuple[str, _Node]]) -> tuple[str, _Node, int]:
    if len(run) == 1:
        return run[0][0], run[0][1], 1
    return f"[{run[0][0]}-{run[-1][0]}]", run[0][1], len(run)
