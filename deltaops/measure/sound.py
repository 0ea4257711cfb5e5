"""Whether what was measured are numbers at all: nothing else reaches ratios, goals and files.

JSON has no NaN and no infinity, and a median of them means nothing. So a cell with such a time is
taken out of the results and named among what failed, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

from .cell import Cell


def odd(cell: Cell) -> str | None:
    """The first time of ``cell`` that is no positive number, in words; None where all are."""
    for peer, t in cell.timings.items():
        found = {"median": t.median, "lower quartile": t.low, "upper quartile": t.high}
        found |= {f"round {i + 1}": s for i, s in enumerate(t.each) if s is not None}
        for what, seconds in found.items():
            if not (isfinite(seconds) and seconds > 0):
                return f"{peer}: the {what} is {seconds} s, which is no time. Measure again."
    return None


def sift(cells: Iterable[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """The cells whose times are numbers; of the others, what they are and why they are none."""
    sound, wrong = [], {}
    for cell in cells:
        reason = odd(cell)
        if reason is None:
            sound.append(cell)
        else:
            wrong[f"{cell.group} {cell.label}"] = reason
    return sound, wrong


def checked_peak(found: float | str) -> float | str:
    """The peak, or why it is none."""
    if isinstance(found, str) or (isfinite(found) and found > 0):
        return found
    return f"the probe gave {found} GF/s, which is no rate. Measure again."
