"""Figures of others for the same methods, and whether the order that they give holds here.

Their models and tasks are others, so that no number can be held against one of ours, and the order
alone is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt

from deltaops.measure.cell import OURS

from .clock import FULL_TUNING
from .contenders import FULL, HEAD
from .lines import Means, Record
from .reader import NAMED


@dataclass(frozen=True)
class Figures:
    """One source: contender → what it reached there, more being better."""

    title: str
    what: str
    values: dict[str, float]
    tie: float = 0.0
    """Points below which the source's own figures are not told apart; 0 where it is not known."""


GSM8K = 1319
"""Problems that PEFT's runs are tested on: all of its test set, as their README says."""
PEFT_TIE = 200 * sqrt(2 * 0.41 * (1 - 0.41) / GSM8K)
"""Twice the standard error of the difference of two accuracies around theirs, in points."""
SOURCES = (
    Figures(
        "Ding et al.",
        "Ding et al. 2023 (arXiv 2203.06904): RoBERTa-large, mean of 8 tasks, all data, no "
        "template; beside the start their zero-shot. Which of these gaps they "
        "establish is not known here",
        {"houlsby": 87.4, "bitfit": 86.6, "prompt": 77.7, HEAD: 23.7},
    ),
    Figures(
        "PEFT's runs",
        "PEFT's own runs of Llama-3.2-3B on MetaMathQA, accuracy in %: their LoRA has r = 32, and "
        "beside BitFit stands their BEFT, which adds new biases to layers' outputs. Times are of "
        f"whole runs on one GPU. Below {PEFT_TIE:.1f} points, twice the standard error of a "
        f"difference at the {GSM8K} problems of GSM8K, their figures are not told apart",
        {"lora": 47.8, FULL: 47.2, "prefix": 41.6, "prompt": 34.3, "bitfit": 32.1},
        PEFT_TIE,
    ),
    Figures(
        "Qin et al.",
        "Qin et al. 2021 (arXiv 2110.07867): what q numbers recover of a trained prompt on 20 "
        "tasks that their decoder had not seen, in %; ours is a random projection",
        {"prompt": 100.0, "intrinsic-250": 83.0, "intrinsic": 65.0},
    ),
)
SECONDS = {"lora": 942, "dora": 1191, "bitfit": 881, "prefix": 878, "prompt": 1429, FULL: 2147}
"""Of PEFT's runs, whole, on one GPU."""


def standard_error(learned: Means) -> float:
    """Of the accuracy, as a share: what another draw of as many test texts would change, and of
    as many seeds where there are several."""
    a = learned.accuracy
    of_seeds = 0.0 if learned.spread is None else learned.spread**2 / len(learned.seeds)
    return sqrt(a * (1 - a) / learned.examples + of_seeds)


def told_apart(a: Means, b: Means) -> bool:
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
TIED = "not told apart there"


def orders(source: Figures, records: Sequence[Record], batch_size: int) -> dict[str, list[str]]:
    """:data:`SAME`, :data:`OTHER`, :data:`OPEN` and :data:`TIED` → the source's pairs, better there
    first, with the points between them.

    Args:
        batch_size: texts of the last batch, whose loss is told of two that changed places.
    """
    found: dict[str, list[str]] = {SAME: [], OTHER: [], OPEN: [], TIED: []}
    lines = {r.name: r for r in records if r.name in source.values and r.learned is not None}
    ranked = sorted(lines, key=lambda name: -source.values[name])
    for first, second in combinations(ranked, 2):
        a, b = lines[first].learned, lines[second].learned
        assert a is not None  # only such lines are taken
        assert b is not None
        points = 100 * (a.accuracy - b.accuracy)
        there = source.values[first] - source.values[second]
        said = OPEN if not told_apart(a, b) else SAME if points > 0 else OTHER
        said = TIED if there < source.tie else said
        gaps = f"{points:+.1f} points here, {there:+.1f} there"
        if said == OTHER and None not in (a.training_loss, b.training_loss):
            gaps += (
                f"; loss of the last batch of {batch_size} texts: {a.training_loss:.2f} and "
                f"{b.training_loss:.2f} nats"
            )
        found[said].append(f"{lines[first].title} before {lines[second].title} ({gaps})")
    return found


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
        "full tuning's time / the method's, PEFT's whole runs on one GPU", "the same here, a step",
    )  # fmt: skip


def without_figures(head: str, records: Sequence[Record]) -> list[str]:
    """Titles of lines that no source has an accuracy for."""
    named = {name for s in figures_of(head) for name in s.values} | {HEAD}
    return [r.title for r in records if r.name not in named]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
