"""The shapes and settings that every backend of ``cross_entropy`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropyCase:
    """One row of the table; ``str`` is its test id."""

    m: int
    v: int
    mean: bool = True
    layout: str = "dense"
    """"dense", "padded": rows apart, or "columns": classes apart, which is copied."""
    ignore_index: int = -100
    ignored: int = 3
    """Every so manieth row counts for nothing; 0: all count."""
    offset: float = 0.0
    """Added to all logits: exponentials of them would overflow."""

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.v}", "mean" if self.mean else "sum"]
        parts += [] if self.layout == "dense" else [self.layout]
        parts += [] if self.ignored else ["all"]
        parts += [f"offset{self.offset:g}"] if self.offset else []
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Logits, the same for every dtype up to rounding, with the spread of a trained model's,
        and their targets."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.m, self.v + 3)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 4 + self.offset
        logits = drawn.to(dtype)
        if self.layout == "columns":
            logits = logits.t().contiguous().t()
        logits = logits[:, : self.v]
        target = torch.randint(0, self.v, (self.m,), generator=generator)
        if self.ignored:
            target[1 :: self.ignored] = self.ignore_index
        return logits.contiguous() if self.layout == "dense" else logits, target


CROSS_ENTROPY_CASES = (
    CrossEntropyCase(5, 1000),
    CrossEntropyCase(1, 1, ignored=0),
    CrossEntropyCase(3, 7, mean=False),
    CrossEntropyCase(33, 63, layout="padded"),
    CrossEntropyCase(9, 4097, mean=False, ignored=0),
    CrossEntropyCase(8, 31, layout="columns", ignore_index=3),
    CrossEntropyCase(6, 130, offset=1e4),
    CrossEntropyCase(2, 32003, ignored=0),
)
"""The mean over no row is no number, and stands in tests of its own."""
