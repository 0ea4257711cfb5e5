"""The table of methods as a picture: accuracy by trained parameters, and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaops.measure.cell import EAGER, OURS
from deltaops.measure.picture import COLOURS, OTHER

from .clock import FULL_TUNING
from .contenders import FULL, HEAD
from .lines import Means, Record
from .papers import standard_error
from .point_labels import Box, label_points

PEERS = {OURS: COLOURS[OURS], EAGER: OTHER, FULL_TUNING: "#b9c4d6"}
FAMILIES = {
    "addition": ("#2457a7", "houlsby", "pfeiffer", "parallel", "compacter", "prefix", "prefix-mlp",
                 "prefix-pool", "prompt", "pool"),
    "specification": ("#c08a4a", "bitfit", "ia3", "lntuning"),
    "reparameterisation": ("#3c8a5a", "lora", "dora", "intrinsic", "intrinsic-adapter",
                           "intrinsic-250", "intrinsic-adapter-250", "intrinsic-1000",
                           "intrinsic-adapter-1000"),
}  # fmt: skip
"""Delta tuning's three families (Ding et al. 2023) → colour and contenders."""
OTHERS = ("combined or chosen", "#7a4a9c")
"""What a legend calls the rest, and its colour."""
LINE = "#777777"
ROOM = 3
"""Half the width of what a line takes, in pixels."""


def draw_table(path: Path, records: Sequence[Record], subtitle: str) -> None:
    """Test accuracy over trained parameters left, milliseconds a step right, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [r for r in records if r.timed is not None]
    height = max(5.6, 1.4 + 0.42 * len(timed))
    figure = Figure(figsize=(14 if timed else 8.4, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    shares = [3, 2] if timed else [1]
    left, *right = figure.subplots(1, len(shares), width_ratios=shares, squeeze=False)[0]
    for ax in (left, *right):
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in right:
        _times(ax, timed)
    figure.suptitle(subtitle, fontsize=8, color="#666666")
    _accuracies(left, records)
    figure.savefig(path, format="png")


def _accuracies(ax: Any, records: Sequence[Record]) -> None:
    """Points with their deviation over seeds, or of one their standard errors; the start and full
    tuning are lines."""
    learned = {r.name: (r, r.learned) for r in records if r.learned is not None}
    lines = [learned.pop(name) for name in (FULL, HEAD) if name in learned]
    points = list(learned.values())
    for r, found in points:
        ax.errorbar(
            _trained(r), 100 * found.accuracy, yerr=100 * _bar_of(found), fmt="o", capsize=2,
            markersize=6, color=_colour(r.name), ecolor="#aaaaaa", elinewidth=1,
        )  # fmt: skip
    sizes = [_trained(r) for r, _ in points] or [1]
    ax.set_xscale("log")
    ax.set_xlim(min(sizes) / 3, max(sizes) * 100)
    values = [100 * found.accuracy for _, found in (*points, *lines)] or [0.0, 100.0]
    room = 0.07 * (max(values) - min(values)) + 0.5
    ax.set_ylim(min(values) - room, max(values) + room)
    ax.set_xlabel("trained parameters of the method", fontsize=8)
    several = any(found.spread is not None for _, found in points)
    bar = "standard deviation over the seeds" if several else "its standard error"
    ax.set_ylabel(f"test accuracy, % (± {bar})", fontsize=8)
    used = [f for f, (_, *names) in FAMILIES.items() if any(r.name in names for r, _ in points)]
    for family in used:
        ax.plot([], [], "o", color=FAMILIES[family][0], label=family)
    if any(_colour(r.name) == OTHERS[1] for r, _ in points):
        ax.plot([], [], "o", color=OTHERS[1], label=OTHERS[0])
        used.append(OTHERS[0])
    if used:
        ax.legend(
            fontsize=8, frameon=False, ncols=len(used), loc="lower right", bbox_to_anchor=(1, 1)
        )
    ax.figure.draw_without_rendering()  # settles the layout, which labels are placed in
    taken = [box for r, found in lines for box in _line(ax, r, found)]
    taken += [_bar(ax, r, found) for r, found in points]
    label_points(
        ax, [(_trained(r), 100 * found.accuracy) for r, found in points],
        [f"{r.title}  {100 * found.accuracy:.1f}" for r, found in points], taken,
    )  # fmt: skip


def _bar(ax: Any, record: Record, found: Means) -> Box:
    """The room of a point's error bar, in pixels."""
    x, middle = ax.transData.transform((_trained(record), 100 * found.accuracy))
    _, top = ax.transData.transform((_trained(record), 100 * (found.accuracy + _bar_of(found))))
    return x - ROOM, 2 * middle - top - ROOM, x + ROOM, top + ROOM


def _trained(record: Record) -> int:
    """Parameters that train: at the end, where a controller changed their number."""
    learned = record.learned
    return record.trained if learned is None or learned.trained is None else learned.trained


def _bar_of(found: Means) -> float:
    return standard_error(found) if found.spread is None else found.spread


def _line(ax: Any, record: Record, found: Means) -> tuple[Box, Box]:
    """A level across the picture. Returns: the room of its label and its own, in pixels."""
    value = 100 * found.accuracy
    ax.axhline(value, color=LINE, linewidth=1, linestyle="--", zorder=0)
    below = record.name == HEAD
    what = f"start: {record.title}" if below else f"{record.title}, {record.trained:,} parameters"
    text = ax.annotate(
        f"{what}  {value:.1f}", (0.99 if below else 0.01, value),
        xycoords=ax.get_yaxis_transform(), xytext=(0, -3 if below else 3),
        textcoords="offset points", ha="right" if below else "left",
        va="top" if below else "bottom", fontsize=8, color=LINE,
    )  # fmt: skip
    text.set_in_layout(False)
    box = text.get_window_extent(ax.figure.canvas.get_renderer())
    area = ax.get_window_extent()
    _, level = ax.transData.transform((record.trained or 1, value))
    return (box.x0, box.y0, box.x1, box.y1), (area.x0, level - ROOM, area.x1, level + ROOM)


def _colour(name: str) -> str:
    return next((colour for colour, *names in FAMILIES.values() if name in names), OTHERS[1])


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
    ax.set_yticks(range(len(records)), [r.title for r in records])
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds a training step (median, quartiles)", fontsize=8)
    ax.legend(fontsize=8, frameon=False, ncols=len(PEERS), loc="lower right", bbox_to_anchor=(1, 1))
