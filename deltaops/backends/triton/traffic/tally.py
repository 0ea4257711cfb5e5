"""What the entries of kernels add to, and where they are found by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor


@dataclass
class Traffic:
    """Of one launch, or of several. Bytes, operations."""

    loaded: int = 0
    stored: int = 0
    once: int = 0
    operations: int = 0
    launches: int = 0

    def load(self, t: Tensor, elements: int, asked: int) -> None:
        """``elements`` of ``t`` are read, ``asked`` times in all together."""
        self.loaded += asked * t.element_size()
        self.once += elements * t.element_size()

    def store(self, t: Tensor, elements: int) -> None:
        """``elements`` of ``t`` are written, each once."""
        self.stored += elements * t.element_size()
        self.once += elements * t.element_size()

    def dots(self, count: int, m: int, n: int, k: int) -> None:
        """``count`` products of [m, k] by [k, n]."""
        self.operations += 2 * count * m * n * k

    @property
    def asked(self) -> int:
        """Bytes that all programs load and store."""
        return self.loaded + self.stored

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.loaded + other.loaded,
            self.stored + other.stored,
            self.once + other.once,
            self.operations + other.operations,
            self.launches + other.launches,
        )


L2 = 50 << 20
"""Bytes of an H100's L2 (NVIDIA H100 Tensor Core GPU Architecture, table 3); taken for all."""
AT_ONCE = 256
"""Programs at work: two for each of its 132 multiprocessors, nearly."""

Entry = Callable[[SimpleNamespace, tuple[int, ...], Traffic], None]
ENTRIES: dict[str, Entry] = {}


def entry(kernel: str) -> Callable[[Entry], Entry]:
    """What the launch parameters (by name), the grid and the tally make of ``kernel``."""

    def keep(function: Entry) -> Entry:
        ENTRIES[kernel] = function
        return function

    return keep


def distinct(t: Tensor) -> int:
    """Elements of ``t`` in memory: a broadcast dimension is one."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)


def cdiv(a: int, b: int) -> int:
    """Of a / b, the next integer above."""
    return -(-a // b)
