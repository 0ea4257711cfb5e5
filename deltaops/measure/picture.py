"""The measured layers and steps as bars, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cell import ACCELERATED, EAGER, FROZEN, OURS, OURS_COMPILED, Cell
from .compare.point_labels import DOT, label_points
from .stacks import LIMIT, over_dearest, products_over_dearest

COLOURS = {
    "frozen base": "#b9c4d6", FROZEN: "#b9c4d6", OURS: "#2457a7", OURS_COMPILED: "#4f7fcb",
    ACCELERATED: "#4f7fcb",
}  # fmt: skip
OTHER = "#c08a4a"
LABELLED = 12
"""Stacks whose names are written, the slowest ones."""


def draw_steps(path: Path, results: Sequence[Cell], subtitle: str) -> None:
    """One group of horizontal bars for each workload: milliseconds a step, with quartiles."""
    _draw(path, results, subtitle, "milliseconds a training step (median, quartiles)")


def draw_layers(path: Path, results: Sequence[Cell], subtitle: str) -> None:
    """One group of horizontal bars for each layer: milliseconds forward and backward."""
    _draw(path, results, subtitle, "milliseconds, forward + backward (median, quartiles)")


def draw_methods(path: Path, results: Sequence[Cell], subtitle: str) -> None:
    """Two bars a method, ours and eager torch's, in a panel for each model and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Cell]] = {}
    for c in results:
        panels.setdefault(f"{c.model} {c.dtype}", []).append(c)
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(6 * len(panels), 1.3 + 0.42 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(1, len(panels), squeeze=False)
    for ax, (title, cells) in zip(grid.flat, panels.items(), strict=True):
        for place, (peer, colour) in enumerate({OURS: COLOURS[OURS], EAGER: OTHER}.items()):
            timed = [(i, c.timings[peer]) for i, c in enumerate(cells) if peer in c.timings]
            ax.barh(
                [i + 0.38 * place - 0.19 for i, _ in timed],
                [1e3 * t.median for _, t in timed], 0.38,
                xerr=[
                    [1e3 * (t.median - t.low) for _, t in timed],
                    [1e3 * (t.high - t.median) for _, t in timed],
                ],
                color=colour, ecolor="#444444", capsize=1.5, label=peer,
            )  # fmt: skip
        ax.set_yticks(range(len(cells)), [c.what for c in cells])
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("milliseconds a training step (median, quartiles)", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(
        fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
    )
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    figure.savefig(path, format="png")


def draw_stacks(path: Path, results: Sequence[Cell], subtitle: str) -> None:
    """A point a stack: its time over its dearest part's, by what its products alone make."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    named = [
        (products, ratio, c.what)
        for c in results
        if (products := products_over_dearest(c)) is not None
        and (ratio := over_dearest(c)) is not None
    ]
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax: Any = figure.subplots()
    ax.scatter([x for x, _, _ in named], [y for _, y, _ in named], s=18, color=COLOURS[OURS])
    top = max(LIMIT, *(max(x, y) for x, y, _ in named)) + 0.02
    ax.plot([1, top], [1, top], color="#888888", linewidth=1, label="its products alone")
    ax.axhline(LIMIT, color=OTHER, linewidth=1, linestyle="--", label="the goal")
    ax.set_xlabel("flops of the stack over those of its dearest part", fontsize=8)
    ax.set_ylabel("time of the stack over that of its dearest part (median)", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    figure.draw_without_rendering()  # settles the layout, which labels are placed in
    named.sort(key=lambda n: -n[1])
    others = (ax.transData.transform((x, y)) for x, y, _ in named[LABELLED:])
    label_points(
        ax, [(x, y) for x, y, _ in named[:LABELLED]], [what for *_, what in named[:LABELLED]],
        [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in others],
    )  # fmt: skip
    figure.savefig(path, format="png")


def _draw(path: Path, results: Sequence[Cell], subtitle: str, unit: str) -> None:
    bar_figure(results, subtitle, unit).savefig(path, format="png")


def bar_figure(results: Sequence[Cell], subtitle: str, unit: str) -> Any:
    """The matplotlib figure of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(results) > 2 else 1
    rows = -(-len(results) // columns)
    bars = max(len(r.timings) for r in results)
    size = (7 * columns, 0.9 + (0.7 + 0.28 * bars) * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(results) :]:
        ax.set_visible(False)
    for ax, result in zip(grid.flat, results, strict=False):
        names = list(result.timings)[::-1]
        values = [result.timings[n] for n in names]
        middle, longest = [1e3 * t.median for t in values], 1e3 * max(t.high for t in values)
        spread = [
            [1e3 * (t.median - t.low) for t in values],
            [1e3 * (t.high - t.median) for t in values],
        ]
        ax.barh(
            names, middle, xerr=spread, color=[COLOURS.get(n, OTHER) for n in names],
            ecolor="#444444", capsize=2,
        )  # fmt: skip
        for row, value in enumerate(middle):
            text = f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"
            ax.annotate(
                text, (longest, row), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=8, color="#444444",
            )  # fmt: skip
        ax.set_xlim(0, 1.22 * longest)
        ax.set_title(f"{result.group} {result.label}", loc="left", fontsize=10)
        ax.set_xlabel(unit, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    return figure
