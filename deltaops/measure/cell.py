"""What one interleaved run gives: a cell of the results, in memory and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .interleave import Timing

FROZEN, OWN_FROZEN = "frozen eager", "frozen, ours"
OURS, OURS_COMPILED, ACCELERATED = "deltaops", "deltaops, compiled", "PEFT accelerated"
PEFT, PEFT_NARROW, PEFT_COMPILED = "PEFT", "PEFT, bf16 adapters", "PEFT, compiled"
PREPACKED, EAGER = "oneDNN prepacked", "eager torch"
MIXED, MIXED_ROWS = "8 adapters by sample", "8 adapters, rows shuffled"
ROUTED = "8 adapters, all rows one's"
OURS_AGAIN, PREPACKED_AGAIN = "deltaops, in a row", "oneDNN prepacked, in a row"
EMPTY_FUNCTION = "empty Function"
STACK, FIRST, SECOND = "the stack", "first part", "second part"

PEERS_OF_OTHERS = (PEFT, PEFT_NARROW, PEFT_COMPILED, PREPACKED, EAGER)


@dataclass(frozen=True)
class Cell:
    """One setting and the peers that were timed in turns on it."""

    group: str
    """What was run: "gemm", "lora", "parallel", "sequential", "bitfit", "mixed", "call",
    "step", "method" or "stack"."""
    what: str
    """The shape ``M×N×K``, the model and its batch, or the method."""
    dtype: str
    dropout: float
    timings: dict[str, Timing]
    absent: dict[str, str] = field(default_factory=dict)
    """Peer → why it was not timed, in words."""
    saved: dict[str, int] = field(default_factory=dict)
    """Peer → bytes held for the backward pass beyond inputs and parameters."""
    shape: tuple[int, int, int] | None = None
    """M, N, K of a layer."""
    rank: int = 0
    tokens: int = 0
    """Of a training step."""
    note: str = ""
    model: str = ""
    """Of a method: the model that it is on, and its batch."""
    flops: float = 0.0
    """Of a training step: those of the frozen base's products, forward and backward."""
    products: dict[str, int] = field(default_factory=dict)
    """Peer of a stack → flops of its products, forward and backward."""

    def ratio(self, above: str, below: str) -> float | None:
        """The median of the rounds' ratios, else of the medians; None where a peer is missing."""
        if above not in self.timings or below not in self.timings:
            return None
        paired = self.timings[above].over(self.timings[below])
        if paired is not None:
            return paired.median
        return self.timings[above].median / self.timings[below].median

    def speedup(self, peer: str, over: str = PEFT) -> float | None:
        """How many times faster than ``over``; None where a peer is missing."""
        return self.ratio(over, peer)

    def best(self, *peers: str) -> str | None:
        """The fastest of these that were timed."""
        timed = [p for p in peers if p in self.timings]
        return min(timed, key=lambda p: self.timings[p].median) if timed else None

    @property
    def setting(self) -> str:
        """What, and on which model."""
        return f"{self.what} on {self.model}" if self.model else self.what

    @property
    def label(self) -> str:
        """The setting in a few words."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.setting} {self.dtype}{dropout}"

    def as_json(self) -> dict[str, Any]:
        """Every field; times in seconds."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Cell:
        """What :meth:`as_json` wrote."""
        timings = {
            name: Timing(**{**t, "each": tuple(t.get("each", ()))})
            for name, t in value["timings"].items()
        }
        shape = tuple(value["shape"]) if value["shape"] else None
        return cls(**{**value, "timings": timings, "shape": shape})


@dataclass(frozen=True)
class Results:
    """A run: the machine, its peak, and the cells."""

    machine: dict[str, Any]
    peak: dict[str, float | str]
    """dtype → GF/s of the multiply-add units with all threads, or why it was not measured."""
    cells: list[Cell]
    left_out: dict[str, str] = field(default_factory=dict)
    """A part that was planned and not measured → why."""
    failed: dict[str, str] = field(default_factory=dict)
    """A part that a gate stopped → what was wrong. Such a run ends with an error."""

    def of(self, group: str, dtype: str, dropout: float | None = None) -> list[Cell]:
        """The cells of one group and dtype, and of one dropout where it is given."""
        return [
            c
            for c in self.cells
            if (c.group, c.dtype) == (group, dtype) and dropout in (None, c.dropout)
        ]

    def cells_of(self, group: str) -> list[Cell]:
        """The cells of one group, in the order of the run."""
        return [c for c in self.cells if c.group == group]

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return {**asdict(self), "cells": [c.as_json() for c in self.cells]}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Results:
        """What :meth:`as_json` wrote; other keys are left alone."""
        cells = [Cell.of_json(c) for c in value["cells"]]
        return cls(value["machine"], value["peak"], cells, value["left_out"], value["failed"])
