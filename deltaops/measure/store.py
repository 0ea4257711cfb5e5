"""A run on disk: one JSON per machine, its pictures, and the report beside it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError

from .cell import Results
from .goals import evaluate
from .report import worth_drawing
from .sound import checked_peak, sift

DRAWN = {"lora": "loras", "step": "steps", "method": "method-steps", "stack": "by-products"}
"""Group → how its picture is called after the machine; "methods" is the table of ``compare``."""


def slug(facts: dict[str, Any]) -> str:
    """The file name of a machine: processor, threads and instruction set."""
    text = f"{facts['processor']} {facts['threads']} threads {facts['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def as_json(results: Results) -> dict[str, Any]:
    """The results and the goals that follow from them."""
    return {**results.as_json(), "goals": [o.as_json() for o in evaluate(results)]}


def read(path: Path) -> Results:
    """A run from its JSON; goals are computed again. Raises: ConfigError."""
    try:
        found = Results.of_json(json.loads(path.read_text(encoding="utf-8")))
        slug(found.machine)
        cells, wrong = sift(found.cells)  # Python's JSON has NaN
        peaks = {dtype: checked_peak(top) for dtype, top in found.peak.items()}
        return replace(found, peak=peaks, cells=cells, failed=found.failed | wrong)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no JSON of `deltaops bench` ({type(error).__name__}: {error}). "
            "Measure again with --out."
        ) from error


def pictures(results: Results, name: str) -> dict[str, list[Any]]:
    """File name → the cells to draw."""
    drawn = {f"{name}-{end}.png": worth_drawing(results, group) for group, end in DRAWN.items()}
    return {file: cells for file, cells in drawn.items() if cells}
