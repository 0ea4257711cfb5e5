"""Labels beside the points of a picture, where none covers another or a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import cos, radians, sin
from typing import Any

RADII = (9, 14, 22, 32, 44, 58, 76, 96, 120, 150, 190)
"""Distances from a point that are tried, in pixels, the near ones first."""
ANGLES = (0, 180, *(s * a for a in (30, 150, 60, 120, 75, 105, 90, 15, 165) for s in (1, -1)))
CROSSING = 60
"""What a line through another point or what is taken costs, in pixels of distance."""
STRIKING = 200
"""The same of one through a label, which it makes hard to read."""
LEADER = 20
"""From this distance on a line says whose label it is."""
DOT = 6
"""Half the width of the room that a point needs, in pixels."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def label_points(
    ax: Any, points: Sequence[tuple[float, float]], titles: Sequence[str], taken: Sequence[Box] = ()
) -> list[Box]:
    """Write each title near its point; right beside it where there is no room anywhere near.

    Args:
        ax: of matplotlib; limits and layout are settled.
        points: in the data's coordinates.
        titles: one a point.
        taken: where nothing may be written.
    Returns: the boxes of the titles.
    """
    canvas = ax.figure.canvas
    places = [tuple(ax.transData.transform(p)) for p in points]
    dots = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places]
    area = ax.get_window_extent()
    inside = (area.x0, area.y0, area.x1, area.y1)
    written: list[Box] = []
    lines: list[tuple[float, float]] = []
    # the highest first, so that a crowd fans out and lines do not cross
    for i in sorted(range(len(points)), key=lambda i: -places[i][1]):
        text = ax.annotate(
            titles[i], points[i], xytext=(0, 0), textcoords="offset pixels", fontsize=8,
            color="#333333", ha="left", va="bottom",
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent(canvas.get_renderer())
        text.remove()
        # its own error bar is no obstacle to a line that starts on it
        others = [*dots[:i], *dots[i + 1 :], *(b for b in taken if not _holds(b, places[i]))]
        candidates = list(_candidates(places[i], (size.width, size.height)))
        (radius, box), least = candidates[0], float("inf")
        for far, tried in candidates:
            if not _within(tried, inside) or any(
                _meet(tried, b) for b in (*taken, *written, *dots)
            ):
                continue
            way = _way(places[i], tried)
            crossed = sum(any(_holds(b, p) for p in way) for b in others)
            struck = sum(any(_holds(b, p) for p in way) for b in written)
            struck += any(_holds(tried, p) for p in lines)
            cost = far + CROSSING * crossed + STRIKING * struck
            if cost < least:
                radius, box, least = far, tried, cost
        arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 3}
        x, y = places[i]
        found = ax.annotate(
            titles[i], points[i], xytext=(box[0] - x, box[1] - y), textcoords="offset pixels",
            fontsize=8, color="#333333", ha="left", va="bottom",
            arrowprops=arrow if radius >= LEADER else None,
        )  # fmt: skip
        found.set_in_layout(False)
        written.append(box)
        lines += _way(places[i], box) if radius >= LEADER else []
    return written


def _candidates(at: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[int, Box]]:
    """Distance and box: the box touches a circle around the point, from outside."""
    width, height = size
    for radius in RADII:
        for angle in ANGLES:
            dx, dy = cos(radians(angle)), sin(radians(angle))
            # its centre lies half a box further, sideways and upwards by as much as the angle says
            x = at[0] + radius * dx + width / 2 * max(-1.0, min(1.0, 2 * dx))
            y = at[1] + radius * dy + height / 2 * max(-1.0, min(1.0, 2 * dy))
            yield radius, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _way(at: tuple[float, float], box: Box) -> list[tuple[float, float]]:
    """Points between a point and the box's middle, as far as the box."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    steps = [i / 24 for i in range(1, 25)]
    found = [(at[0] + s * (x - at[0]), at[1] + s * (y - at[1])) for s in steps]
    return [p for p in found if not _holds(box, p)]


def _holds(box: Box, point: tuple[float, float]) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _within(box: Box, outer: Box) -> bool:
    low = box[0] >= outer[0] and box[1] >= outer[1]
    return low and box[2] <= outer[2] and box[3] <= outer[3]
