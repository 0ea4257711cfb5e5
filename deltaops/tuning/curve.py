"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loop import Point

INK, SOFT, ACCENT = "#222222", "#b9c4d6", "#2457a7"


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def draw_curve(
    path: Path,
    history: Sequence[Point],
    title: str,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> None:
    """Draw training loss against steps, and the held-out loss before and after, as PNG."""
    canvas, axes = figure(7, 3.8)
    draw_loss(axes, history, before, after)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    canvas.savefig(path, format="png")


def draw_loss(
    axes: Any,
    history: Sequence[Point],
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> None:
    """The curve on given axes: each step faint, a running mean over it, held-out values as dots."""
    steps = [p.step for p in history]
    losses = [p.loss for p in history]
    axes.plot(steps, losses, color=SOFT, linewidth=0.8, label="training, each step")
    if len(losses) >= 20:
        axes.plot(
            steps, running_mean(losses), color=ACCENT, linewidth=1.8, label="training, smoothed"
        )
    ends = [(0, before), (steps[-1] if steps else 0, after)]
    held = [(step, metrics["loss"]) for step, metrics in ends if metrics is not None]
    if held:
        axes.plot(*zip(*held, strict=True), "o--", color="#c0392b", linewidth=1, label="held out")
        for (step, loss), side in zip(held, ("left", "right"), strict=False):
            axes.annotate(
                f"{loss:.3f}",
                (step, loss),
                xytext=(6 if side == "left" else -6, 6),
                textcoords="offset points",
                ha=side,
                fontsize=9,
                color="#c0392b",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    axes.legend(frameon=False, fontsize=9)


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(mean / weight)
    return out
