"""The table of methods as a picture: accuracy beside the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cell import EAGER, OURS
from .compare import FULL_TUNING, Record
from .picture import COLOURS, OTHER
from .table_report import standard_error

PEERS = {OURS: COLOURS[OURS], EAGER: OTHER, FULL_TUNING: "#b9c4d6"}


def draw_table(path: Path, records: Sequence[Record], subtitle: str) -> None:
    """Horizontal bars, one row a method: test accuracy left, milliseconds a step right, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 0.42 * len(records)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(records))
    _accuracies(left, records)
    _times(right, records)
    left.set_yticks(list(rows), [r.title for r in records])
    left.invert_yaxis()
    for ax in (left, right):
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    figure.savefig(path, format="png")


def _accuracies(ax: Any, records: Sequence[Record]) -> None:
    for row, r in enumerate(records):
        if r.learned is None:
            continue
        value, error = 100 * r.learned.accuracy, 100 * standard_error(r.learned)
        ax.barh(row, value, xerr=error, color=COLOURS[OURS], ecolor="#444444", capsize=2)
        ax.annotate(
            f"{value:.1f}", (value, row), xytext=(8, 0), textcoords="offset points", va="center",
            fontsize=8, color="#444444",
        )  # fmt: skip
    values = [100 * r.learned.accuracy for r in records if r.learned is not None]
    ax.set_xlim(max(0.0, min(values, default=5.0) - 5), 101)
    ax.set_xlabel("test accuracy, % (± its standard error)", fontsize=8)


def _times(ax: Any, records: Sequence[Record]) -> None:
    height = 0.8 / len(PEERS)
    for place, (peer, colour) in enumerate(PEERS.items()):
        timed = [
            (row, r.timed.timings[peer])
            for row, r in enumerate(records)
            if r.timed is not None and peer in r.timed.timings
        ]
        ax.barh(
            [row + (place - 1) * height for row, _ in timed],
            [1e3 * t.median for _, t in timed],
            height,
            xerr=[
                [1e3 * (t.median - t.low) for _, t in timed],
                [1e3 * (t.high - t.median) for _, t in timed],
            ],
            color=colour, ecolor="#444444", capsize=1.5, label=peer,
        )  # fmt: skip
    ax.set_xlabel("milliseconds a training step (median, quartiles)", fontsize=8)
    ax.legend(fontsize=8, frameon=False, ncols=len(PEERS), loc="lower right", bbox_to_anchor=(1, 1))
