"""A monitor's table as pictures: the run's curves, and its places against its steps.

monitor.png   loss, gradient norm, noise and effective rank by part, in panels under each other
places.png    a map of the gradients' norms: a line for each place, a column for each row of steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError
from deltaops.files import write_atomically

from .table import Table

INK, SOFT = "#222222", "#8a93a3"
PANELS = {
    "loss": "loss, training and validation",
    "gradient_norm": "gradient norm",
    "gradient_noise": "noise scale, batches",
    "effective_rank": "effective rank",
}
PLACES = 60
"""Lines of the map that still can be read."""


def draw(table: Table, folder: Path) -> list[Path]:
    """Write what there are rows for. Raises: ConfigError for an empty table."""
    if not len(table):
        raise ConfigError("Monitor.draw: the table is empty. Draw it when the run has begun.")
    made = [_write(folder / "monitor.png", lambda path: _curves(table, path))]
    if any(place for _, _, place in table.keys("gradient_norm")):
        made.append(_write(folder / "places.png", lambda path: _map(table, path)))
    return made


def _curves(table: Table, path: Path) -> None:
    shown = [quantity for quantity in PANELS if table.keys(quantity)]
    figure = _figure(7.5, 1 + 2.2 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, quantity in zip(panels, shown, strict=True):
        keys = [key for key in table.keys(quantity) if not key[2]]
        if quantity == "loss":
            keys += [key for key in table.keys() if key[0] == "eval_loss"]
        for key in keys:
            steps, values = zip(*table.series(key[0], delta=key[1]), strict=True)
            label = "validation" if key[0] == "eval_loss" else key[1] or "run"
            axes.plot(steps, values, ".-" if len(steps) < 50 else "-", linewidth=1.2, label=label)
        axes.set_ylabel(PANELS[quantity].split(",")[0], fontsize=9, color=INK)
        axes.set_title(PANELS[quantity], loc="left", fontsize=9, color=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        if quantity in ("gradient_norm", "gradient_noise"):
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("step")
    figure.savefig(path, format="png")


def _map(table: Table, path: Path) -> None:
    keys = [key for key in table.keys("gradient_norm") if key[2]]
    loud = sorted(keys, key=lambda k: max(table.values(k[0], delta=k[1], place=k[2])), reverse=True)
    chosen = set(loud[:PLACES])
    lines = [key for key in keys if key in chosen]
    series = [dict(table.series(key[0], delta=key[1], place=key[2])) for key in lines]
    steps = sorted({step for one in series for step in one})
    values = [
        [math.log10(one[s]) if one.get(s, 0) > 0 else math.nan for s in steps] for one in series
    ]
    figure = _figure(8.5, 1.4 + 0.16 * len(lines))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
    several = len({key[1] for key in lines}) > 1
    axes.set_yticks(
        range(len(lines)), [f"{k[1]} {k[2]}" if several else k[2] for k in lines], fontsize=6
    )
    ticks = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(list(ticks), [str(steps[i]) for i in ticks], fontsize=8)
    axes.set_xlabel("step")
    left = f", the {PLACES} largest of {len(keys)}" if len(keys) > len(lines) else ""
    axes.set_title(f"gradient norm by place, log₁₀{left}", loc="left", fontsize=9, color=INK)
    figure.colorbar(image, ax=axes, fraction=0.03)
    figure.savefig(path, format="png")


def _figure(width: float, height: float) -> Any:
    """Without a display; matplotlib is loaded here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(path: Path, make: Callable[[Path], None]) -> Path:
    write_atomically(path, make)
    return path
