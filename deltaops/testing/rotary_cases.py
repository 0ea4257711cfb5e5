"""The shapes and settings that every backend of ``rotary`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryCase:
    """One row of the table; ``str`` is its test id."""

    b: int
    h: int
    l: int  # noqa: E741  # the shape is [B, H, L, D]
    d: int
    layout: str = "attention"
    """"attention": [B,L,H,D] memory transposed; "merged": that, a slice of q, k and v side by side;
    "dense": [B,H,L,D] memory; "columns": elements of a head apart, which is copied."""
    shared: bool = True
    """Whether cos and sin are ``[1, L, D]``."""
    wide_tables: bool = False
    """Whether they are float32 whatever x is."""

    def __str__(self) -> str:
        parts = [f"{self.b}x{self.h}x{self.l}x{self.d}", self.layout]
        parts += [] if self.shared else ["each"]
        parts += ["wide"] if self.wide_tables else []
        return "-".join(parts)

    def _heads(self, dtype: torch.dtype, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.b, self.l, 3 * self.h, self.d)
        merged = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        x = merged[:, :, self.h : 2 * self.h].transpose(1, 2)
        if self.layout == "merged":
            return x
        if self.layout == "attention":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "dense":
            return x.contiguous()
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def tensors(self, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, cos and sin, the same for every dtype up to rounding.

        The halves of cos and of sin differ, unlike a model's: an op that reads one half is found.
        """
        generator = torch.Generator().manual_seed(seed + 100)
        shape = (1 if self.shared else self.b, self.l, self.d)
        angles = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        narrow = torch.float32 if self.wide_tables and dtype != torch.float64 else dtype
        return self._heads(dtype, seed), angles.cos().to(narrow), angles.sin().to(narrow)

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[B, H, L, D]``, in the layout of x."""
        return self._heads(dtype, seed)


ROTARY_CASES = (
    RotaryCase(2, 4, 5, 64),
    RotaryCase(0, 4, 5, 8),
    RotaryCase(2, 3, 0, 8, "dense"),
    RotaryCase(3, 1, 1, 2),
    RotaryCase(2, 3, 7, 6, "merged", shared=False),
    RotaryCase(2, 9, 1, 64, "attention", wide_tables=True),
    RotaryCase(1, 5, 13, 80, "dense", shared=False, wide_tables=True),
    RotaryCase(2, 2, 11, 128, "merged", wide_tables=True),
    RotaryCase(3, 2, 3, 34, "columns"),
    RotaryCase(2, 1, 9, 62, "dense"),
    RotaryCase(2, 8, 96, 80, shared=False),
)
