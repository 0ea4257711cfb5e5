"""The shapes and settings that every backend of ``gated`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatedCase:
    """One row of the table; ``str`` is its test id."""

    m: int
    k: int
    activation: str = "silu"
    layout: str = "apart"
    """"apart": two matrices; "merged": the halves of one ``[M, 2K]``; "columns": strided in K."""
    spread: float = 2.0
    """Standard deviation of gate: a large one reaches the flat ends of the activation."""

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.k}-{self.activation}"]
        parts += [] if self.layout == "apart" else [self.layout]
        parts += [] if self.spread == 2.0 else [f"spread{self.spread:g}"]
        return "-".join(parts)

    def tensors(self, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """gate and up, the same for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.m, 2 * self.k)
        both = torch.randn(shape, generator=generator, dtype=torch.float64)
        both[:, : self.k] *= self.spread
        both = both.to(dtype)
        if self.layout == "columns":
            both = both.t().contiguous().t()
        gate, up = both.chunk(2, -1)
        return (gate.contiguous(), up.contiguous()) if self.layout == "apart" else (gate, up)

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[M, K]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.m, self.k, generator=generator, dtype=torch.float64).to(dtype)


GATED_CASES = (
    GatedCase(64, 48),
    GatedCase(0, 16, "gelu"),
    GatedCase(1, 1),
    GatedCase(7, 1, "gelu_tanh"),
    GatedCase(5, 67, "relu"),
    GatedCase(13, 9, "identity", "merged"),
    GatedCase(131, 129, "silu", "merged"),
    GatedCase(61, 71, "gelu", "merged"),
    GatedCase(40, 29, "gelu_tanh", "columns"),
    GatedCase(97, 53, "silu", spread=40.0),
    GatedCase(33, 300, "gelu", spread=40.0),
    GatedCase(300, 1376),
)
