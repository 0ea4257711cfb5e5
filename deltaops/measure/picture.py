"""Bars of the measured steps, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .steps import ATTACHED, FROZEN, StepResult

COLOURS = {FROZEN: "#b9c4d6", ATTACHED: "#2457a7"}
OTHER = "#7d93b5"


def draw_steps(path: Path, results: Sequence[StepResult], subtitle: str) -> None:
    """One group of horizontal bars for each workload: milliseconds a step, with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 1.9 * len(results)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(results), 1, squeeze=False)
    for ax, result in zip(axes[:, 0], results, strict=True):
        names = list(result.timings)[::-1]
        values = [result.timings[n] for n in names]
        middle = [1e3 * t.median for t in values]
        spread = [
            [1e3 * (t.median - t.low) for t in values],
            [1e3 * (t.high - t.median) for t in values],
        ]
        ax.barh(
            names, middle, xerr=spread, color=[COLOURS.get(n, OTHER) for n in names],
            ecolor="#444444", capsize=2,
        )  # fmt: skip
        for row, value in enumerate(middle):
            ax.annotate(
                f"{value:.0f} ms", (0, row), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=9, color="white",
            )  # fmt: skip
        dropout = f", dropout {result.dropout:g}" if result.dropout else ""
        ax.set_title(f"{result.workload}{dropout}", loc="left", fontsize=10)
        ax.set_xlabel("milliseconds a training step (median, quartiles)", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    figure.savefig(path, format="png")
