"""The shapes and settings that every backend of ``attention`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionTensors:
    """The arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    causal: bool

    def to(self, dtype: torch.dtype) -> AttentionTensors:
        """The same values in another dtype; strides are kept."""
        q, k, v = (t.to(dtype) for t in (self.q, self.k, self.v))
        return AttentionTensors(q, k, v, self.mask, self.scale, self.causal)

    def forward_arguments(self) -> tuple[object, ...]:
        """For ``backend.attention_forward(*…)``."""
        return self.q, self.k, self.v, self.mask, self.scale, self.causal

    def backward_arguments(self, grad_y: Tensor, y: Tensor, lse: Tensor) -> tuple[object, ...]:
        """For ``backend.attention_backward(*…, needs)``."""
        return grad_y, self.q, self.k, self.v, y, lse, self.mask, self.scale, self.causal


@dataclass(frozen=True)
class AttentionCase:
    """One row of the table; ``str`` is its test id."""

    b: int
    h: int
    l_q: int
    d: int
    h_kv: int = 0
    """Heads of keys and values; 0: as many as of queries."""
    l_kv: int = -1
    """Keys; −1: as many as queries."""
    layout: str = "attention"
    """"attention": [B,L,H,D] memory transposed; "merged": that, slices of one projection; "dense":
    [B,H,L,D] memory; "columns": elements of a head apart, which is copied."""
    mask: str = ""
    """"each" [B,H,Lq,Lk], "shared" [B,1,Lq,Lk] or "rows" [B,1,1,Lk], with queries that see no key,
    or ""."""
    causal: bool = False
    scale: float = 0.0
    """0: ``D ** -0.5``."""

    def __str__(self) -> str:
        heads = f"{self.h}" if not self.h_kv else f"{self.h}:{self.h_kv}"
        length = f"{self.l_q}" if self.l_kv < 0 else f"{self.l_q}:{self.l_kv}"
        parts = [f"{self.b}x{heads}x{length}x{self.d}", self.layout]
        parts += [f"mask{self.mask}"] if self.mask else []
        parts += ["causal"] if self.causal else []
        parts += [f"scale{self.scale:g}"] if self.scale else []
        return "-".join(parts)

    def _heads(self, heads: int, length: int, dtype: torch.dtype, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.b, length, 3 * heads, self.d)
        merged = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        x = merged[:, :, heads : 2 * heads].transpose(1, 2)
        if self.layout == "merged":
            return x
        if self.layout == "attention":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "dense":
            return x.contiguous()
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def tensors(self, dtype: torch.dtype, *, seed: int = 0) -> AttentionTensors:
        """The same for every dtype up to rounding."""
        h_kv = self.h_kv or self.h
        l_kv = self.l_q if self.l_kv < 0 else self.l_kv
        return AttentionTensors(
            self._heads(self.h, self.l_q, dtype, seed),
            self._heads(h_kv, l_kv, dtype, seed + 10),
            self._heads(h_kv, l_kv, dtype, seed + 20),
            self._mask(l_kv, seed + 30),
            self.scale or self.d**-0.5,
            self.causal,
        )

    def _mask(self, l_kv: int, seed: int) -> Tensor | None:
        if not self.mask:
            return None
        generator = torch.Generator().manual_seed(seed)
        if self.mask == "rows":  # padding at the end; the last sequence is nothing else
            kept = torch.randint(1, l_kv + 1, (self.b,), generator=generator)
            kept[-1:] = 0
            rows = torch.arange(l_kv) < kept[:, None]
            return rows[:, None, None].expand(self.b, self.h, self.l_q, l_kv)
        shape = (self.b, self.h if self.mask == "each" else 1, self.l_q, l_kv)
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[:, :, self.l_q // 2] = False
        return mask.expand(self.b, self.h, self.l_q, l_kv)

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[B, H, Lq, D]``, in the layout of q."""
        return self._heads(self.h, self.l_q, dtype, seed)


ATTENTION_CASES = (
    AttentionCase(2, 4, 33, 64),
    AttentionCase(2, 4, 96, 64, causal=True),
    AttentionCase(0, 2, 5, 8),
    AttentionCase(2, 2, 0, 8, causal=True),
    AttentionCase(2, 2, 3, 8, l_kv=0),
    AttentionCase(1, 1, 1, 1),
    AttentionCase(3, 1, 1, 2, causal=True),
    AttentionCase(2, 8, 1, 64, h_kv=2, l_kv=77),
    AttentionCase(1, 6, 17, 80, h_kv=3, layout="merged", causal=True),
    AttentionCase(2, 5, 19, 6, h_kv=1, layout="dense", mask="each"),
    AttentionCase(2, 3, 31, 34, l_kv=67, mask="shared", layout="merged"),
    AttentionCase(3, 4, 29, 16, h_kv=2, mask="rows"),
    AttentionCase(2, 2, 45, 24, mask="shared", causal=True),
    AttentionCase(2, 3, 13, 33, layout="columns", scale=0.5),
    AttentionCase(1, 2, 257, 128, causal=True),
    AttentionCase(1, 3, 197, 64, layout="merged"),
    AttentionCase(1, 2, 130, 96, h_kv=1, l_kv=515, mask="each", scale=1.0),
    AttentionCase(1, 1, 65, 256, causal=True),
)
