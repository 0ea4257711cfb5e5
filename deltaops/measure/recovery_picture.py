"""What few numbers recover, as a picture: accuracy by q, beside a full prompt and no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .picture import OTHER

NUMBERS, CHANCE = "#2457a7", OTHER
FULL, ALONE = "#444444", "#b9c4d6"


def draw_recovery(
    path: Path, means: Mapping[str, Sequence[dict[str, Any]]], full: str, subtitle: str
) -> None:
    """A panel for each kind of text, as PNG.

    Args:
        path: of the picture.
        means: kind → what :func:`~.recovery_report.summary` says of each q.
        full: what people call what a task has in full.
        subtitle: small, above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(means), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(means), sharey=True, squeeze=False)[0]
    for ax, (kind, rows) in zip(panels, means.items(), strict=True):
        _panel(ax, rows, full)
        ax.set_title(f"{kind}, {rows[0]['tasks']} tasks", loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean accuracy, %", fontsize=8)
    named: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        named.values(), named.keys(), fontsize=8, frameon=False, ncols=len(named),
        loc="outside lower center",
    )  # fmt: skip
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    figure.savefig(path, format="png")


def _panel(ax: Any, rows: Sequence[dict[str, Any]], full: str) -> None:
    places = range(len(rows))
    for name, label, colour in (("full", full, FULL), ("start", "the model alone", ALONE)):
        ax.axhline(100 * rows[0][name], color=colour, linewidth=1.2, label=label)
    for name, label, colour in (
        ("random", "q numbers, random", CHANCE), ("tuned", "q numbers", NUMBERS),
    ):  # fmt: skip
        if rows[0][name] is not None:
            values = [100 * row[name] for row in rows]
            ax.plot(places, values, marker="o", markersize=4, color=colour, label=label)
    for place, row in zip(places, rows, strict=True):
        if row["relative"] is not None:
            ax.annotate(
                f"{row['relative']:.0%}", (place, 100 * row["tuned"]), xytext=(0, -13),
                textcoords="offset points", ha="center", fontsize=8, color=NUMBERS,
            )  # fmt: skip
    ax.set_xticks(list(places), [str(row["q"]) for row in rows])
    ax.set_xlabel("q (below each: E_rel)", fontsize=8)
    ax.margins(x=0.15, y=0.15)
