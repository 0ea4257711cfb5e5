"""One point of a space: a delta, its learning rates, batch size and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltaops.methods import Combined, Delta
from deltaops.tuning.loop import Schedule

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Candidate:
    """All that tells one trial of a search from another."""

    delta: Delta | Combined
    rates: tuple[tuple[str, float], ...]
    """Part of the delta → its peak learning rate; a single delta has the name "" ."""
    batch_size: int
    schedule: str
    warmup: float

    def paces(self) -> dict[str, float]:
        """Part → its factor of the greatest rate."""
        return {part: rate / self.rate for part, rate in self.rates}

    @property
    def rate(self) -> float:
        """The greatest of the peak learning rates."""
        return max(rate for _, rate in self.rates)

    def rate_of(self, steps: int) -> Shape:
        """Its schedule over ``steps`` steps."""
        return Shape(steps, self.rate, self.warmup, self.schedule)

    def __str__(self) -> str:
        rates = ", ".join(f"{part or 'lr'} {rate:.2g}" for part, rate in self.rates)
        warm = f"{self.schedule}, warm-up {self.warmup:.2g}"
        return f"{self.delta}, {rates}, batch {self.batch_size}, {warm}"


@dataclass(frozen=True)
class Shape(Schedule):
    """A schedule whose way down is a line, half a cosine, or none at all."""

    kind: str = "linear"

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0)."""
        warm = max(1, round(self.steps * self.warmup))
        if step < warm:
            return self.lr * (step + 1) / warm
        part = (step - warm) / max(1, self.steps - warm)
        down = {"linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2, "constant": 1.0}
        return self.lr * down[self.kind]


@dataclass(frozen=True)
class Part(Schedule):
    """The schedule ``whole``, for a loop that ends after fewer steps."""

    whole: Schedule | None = None

    @classmethod
    def of(cls, whole: Schedule, steps: int) -> Part:
        """The first ``steps`` of it."""
        return cls(steps, whole.lr, whole.warmup, whole)

    def rate(self, step: int) -> float:
        """That of the whole."""
        assert self.whole is not None
        return self.whole.rate(step)
