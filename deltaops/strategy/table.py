"""What was seen of a run: numbers by step, quantity, delta and place.

step       optimizer steps taken, from 1
quantity   what the number is, such as "loss" or "gradient_norm"
delta      name of the part of the handle; empty for the run as a whole
place      path of its module; empty for all of them
value      the number
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

COLUMNS = ("step", "quantity", "delta", "place", "value")


class Row(NamedTuple):
    """One number; the columns are explained above."""

    step: int
    quantity: str
    delta: str
    place: str
    value: float


Key = tuple[str, str, str]
"""Quantity, delta, place."""


class Table:
    """Rows in the order in which they came, and the series of each quantity."""

    def __init__(self) -> None:
        """Empty."""
        self._series: dict[Key, list[tuple[int, float]]] = {}

    def add(
        self, step: int, quantity: str, value: float, *, delta: str = "", place: str = ""
    ) -> Row:
        """One more row, whose step is not below those before it."""
        self._series.setdefault((quantity, delta, place), []).append((step, value))
        return Row(step, quantity, delta, place, value)

    def series(self, quantity: str, *, delta: str = "", place: str = "") -> list[tuple[int, float]]:
        """Step and value, by step; empty where nothing was seen."""
        return self._series.get((quantity, delta, place), [])

    def values(self, quantity: str, *, delta: str = "", place: str = "") -> list[float]:
        """The series without its steps."""
        return [value for _, value in self.series(quantity, delta=delta, place=place)]

    def keys(self, quantity: str | None = None) -> list[Key]:
        """Of all series, or those of one quantity."""
        return [key for key in self._series if quantity in (None, key[0])]

    def rows(self) -> Iterator[Row]:
        """All of them by step; within a step, in the order in which the series began."""
        found = [
            Row(step, *key, value) for key, series in self._series.items() for step, value in series
        ]
        return iter(sorted(found, key=lambda row: row.step))

    def __len__(self) -> int:
        """Number of rows."""
        return sum(len(series) for series in self._series.values())

    # ---------------------------------------------------------------------------------- saving

    def state(self) -> dict[str, Any]:
        """The keys and lengths of the series, for JSON."""
        return {"keys": [[*key, len(series)] for key, series in self._series.items()]}

    def tensors(self) -> dict[str, Tensor]:
        """All steps int64 and values float64, series after series."""
        pairs = [p for s in self._series.values() for p in s]
        return {
            "steps": torch.tensor([step for step, _ in pairs], dtype=torch.int64),
            "values": torch.tensor([value for _, value in pairs], dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take both back, in the place of what is here."""
        steps, values = tensors["steps"].tolist(), tensors["values"].tolist()
        self._series.clear()
        first = 0
        for quantity, delta, place, length in state["keys"]:
            last = first + length
            pairs = zip(steps[first:last], values[first:last], strict=True)
            self._series[quantity, delta, place] = list(pairs)
            first = last
