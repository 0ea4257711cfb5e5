"""Figures of others for the same methods, and whether the order that they give holds here.

Their models and tasks are others, so that no number can be held against one of ours, and the order
alone is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt

from .cell import OURS
from .compare import FULL_TUNING, Learned, Record
from .contenders import FULL, HEAD
from .reader import NAMED


@dataclass(frozen=True)
class Figures:
    """One source: contender → what it reached there, more being better."""

    title: str
    what: str
    values: dict[str, float]


SOURCES = (
    Figures(
        "Ding et al.",
        "Ding et al. 2023 (arXiv 2203.06904): RoBERTa-large, mean of 8 tasks, all data, no "
        "template; beside the start their zero-shot",
        {"houlsby": 87.4, "bitfit": 86.6, "prompt": 77.7, HEAD: 23.7},
    ),
    Figures(
        "PEFT's runs",
        "PEFT's own runs of Llama-3.2-3B on MetaMathQA, accuracy in %; beside BitFit their BEFT, "
        "which adds a bias to outputs too",
        {"lora": 47.8, FULL: 47.2, "prefix": 41.6, "prompt": 34.3, "bitfit": 32.1},
    ),
    Figures(
        "Qin et al.",
        "Qin et al. 2021 (arXiv 2110.07867): what q numbers recover of a trained prompt on 20 "
        "tasks that their decoder had not seen, in %; ours is a random projection",
        {"prompt": 100.0, "intrinsic-250": 83.0, "intrinsic": 65.0},
    ),
)
SECONDS = {"lora": 942, "dora": 1191, "bitfit": 881, "prefix": 878, "prompt": 1429, FULL: 2147}
"""Of PEFT's runs, whole."""


def standard_error(learned: Learned) -> float:
    """Of the accuracy, as a share: what another draw of as many test texts would change."""
    a = learned.accuracy
    return sqrt(a * (1 - a) / learned.examples)


def told_apart(a: Learned, b: Learned) -> bool:
    """Whether two accuracies differ by twice the standard error of their difference or more.

    It is taken as that of two draws of texts; all are tested on the same, so it is rather less.
    """
    error = sqrt(standard_error(a) ** 2 + standard_error(b) ** 2)
    return abs(a.accuracy - b.accuracy) >= 2 * error


def figures_of(head: str) -> tuple[Figures, ...]:
    """The sources; a zero-shot figure has nothing beside it under a trained head."""
    if head == NAMED:
        return SOURCES
    return tuple(
        replace(s, values={k: v for k, v in s.values.items() if k != HEAD}) for s in SOURCES
    )


SAME, OTHER, OPEN = "the same order here", "the other way round here", "not told apart here"


def orders(source: Figures, records: Sequence[Record]) -> dict[str, list[str]]:
    """:data:`SAME`, :data:`OTHER` and :data:`OPEN` → the source's pairs, better there first."""
    found: dict[str, list[str]] = {SAME: [], OTHER: [], OPEN: []}
    lines = {r.name: r for r in records if r.name in source.values and r.learned is not None}
    ranked = sorted(lines, key=lambda name: -source.values[name])
    for first, second in combinations(ranked, 2):
        a, b = lines[first].learned, lines[second].learned
        assert a is not None  # only such lines are taken
        assert b is not None
        points = 100 * (a.accuracy - b.accuracy)
        said = OPEN if not told_apart(a, b) else SAME if points > 0 else OTHER
        pair = f"{lines[first].title} before {lines[second].title} ({points:+.1f} points)"
        found[said].append(pair + (cause(a, b) if said == OTHER else ""))
    return found


def cause(behind: Learned, ahead: Learned) -> str:
    """What the last training loss, of the same batch, says of two that changed places."""
    if behind.training_loss is None or ahead.training_loss is None:
        return ""
    losses = f"{behind.training_loss:.2f} nats against {ahead.training_loss:.2f}"
    if behind.training_loss > ahead.training_loss:
        return f": it had learnt less of the training texts too after these steps, {losses}"
    return f": it had learnt the training texts better, {losses}, and carries less over to others"


def beside(head: str, records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Rows of methods for which a source has a figure; the header is :func:`header`."""
    sources = figures_of(head)
    for r in records:
        if not any(r.name in s.values for s in sources) and r.name not in SECONDS:
            continue
        here = None if r.learned is None else 100 * r.learned.accuracy
        ratio = None if r.timed is None else r.timed.ratio(FULL_TUNING, OURS)
        there = SECONDS[FULL] / SECONDS[r.name] if r.name in SECONDS else None
        times = (None, None) if r.name == FULL else (there, ratio)
        yield (
            r.title, *(_number(s.values.get(r.name), 1) for s in sources), _number(here, 1),
            *(_number(value, 2) for value in times),
        )  # fmt: skip


def header(head: str) -> tuple[str, ...]:
    """Of :func:`beside`."""
    return (
        "method", *(s.title for s in figures_of(head)), "here, %",
        "full tuning's time / the method's, PEFT's runs", "the same here",
    )  # fmt: skip


def without_figures(head: str, records: Sequence[Record]) -> list[str]:
    """Titles of lines that no source has an accuracy for."""
    named = {name for s in figures_of(head) for name in s.values} | {HEAD}
    return [r.title for r in records if r.name not in named]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
