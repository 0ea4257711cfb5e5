"""Ops on rows and heads whose traffic is counted: prefixes, adapters, norms, prompts, products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaops.backends.triton import TritonBackend, library_attention

from .traffic_floor import FORWARD, Floor, meta


@dataclass(frozen=True)
class Prefix:
    """Causal ``prefix_attention``; every gradient is wanted."""

    b: int
    h: int
    h_kv: int
    length: int
    d: int
    prefix: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"prefix_attention B={self.b} H={self.h}/{self.h_kv} L={self.length} P={self.prefix} "
            f"D={self.d} causal {dtype}"
        )

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        q, y = (self.heads(self.h) for _ in range(2))
        k, v = (self.heads(self.h_kv) for _ in range(2))
        pk, pv = (meta(self.dtype, self.h_kv, self.prefix, self.d) for _ in range(2))
        if direction == FORWARD:
            run.prefix_attention_forward(q, k, v, pk, pv, None, 0.125, True)
        else:
            lse = meta(torch.float32, self.b, self.h, self.length)
            needs = [True] * 5
            run.prefix_attention_backward(y, q, k, v, pk, pv, y, lse, None, 0.125, True, needs)

    def heads(self, count: int) -> Tensor:
        """So many of each token."""
        return meta(self.dtype, self.b, count, self.length, self.d)

    def floor(self, direction: str) -> Floor:
        """Forward: q, k, v, the prefix and y, and lse. Backward: those and dy, and every gradient.
        Two products of a query and a key forward, five backward."""
        queries = self.b * self.h * self.length * self.d
        keys = 2 * (self.b * self.length + self.prefix) * self.h_kv * self.d
        pairs = self.length * (self.length + 1) // 2 + self.length * self.prefix
        lse = 4 * self.b * self.h * self.length
        size = self.dtype.itemsize
        if direction == FORWARD:
            moved, products = size * (2 * queries + keys) + lse, 2
        else:
            moved, products = size * (4 * queries + 2 * keys) + lse, 5
        return Floor(moved, 2 * products * self.b * self.h * pairs * self.d)


@dataclass(frozen=True)
class MergedPrefix(Prefix):
    """What is the kernels' where torch's attention has the own keys."""

    def __str__(self) -> str:
        return f"{super().__str__()} merged"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        with library_attention.forced(library_attention.FLASH):
            super().run(direction)

    def heads(self, count: int) -> Tensor:
        """As a projection leaves them."""
        return meta(self.dtype, self.b, self.length, count, self.d).transpose(1, 2)

    def floor(self, direction: str) -> Floor:
        """Forward: q, y, lse and the prefix; y and lse are written anew. Backward: dy, q, y, dq,
        lse and the prefix; dq is written anew, and the prefix's gradients."""
        queries = self.b * self.h * self.length * self.d
        keys, lse = 2 * self.prefix * self.h_kv * self.d, 4 * self.b * self.h * self.length
        size = self.dtype.itemsize
        if direction == FORWARD:
            moved, products = size * (3 * queries + keys) + 2 * lse, 2
        else:
            moved, products = size * (5 * queries + 2 * keys) + lse, 5
        return Floor(moved, 2 * products * queries * self.prefix)


@dataclass(frozen=True)
class Adapter:
    """``bottleneck`` of x, with its biases and x itself added; every gradient is wanted."""

    m: int
    k: int
    rank: int
    norm: str = "none"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        norm = "" if self.norm == "none" else f" after a {self.norm} norm"
        return f"bottleneck {self.m}×{self.k} r={self.rank} gelu{norm} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, normed = TritonBackend(), self.norm != "none"
        x, y = (meta(self.dtype, self.m, self.k) for _ in range(2))
        down, up = meta(self.dtype, self.rank, self.k), meta(self.dtype, self.k, self.rank)
        inner, outer = meta(self.dtype, self.rank), meta(self.dtype, self.k)
        gamma, beta = (meta(self.dtype, self.k) if normed else None for _ in range(2))
        if direction == FORWARD:
            run.bottleneck_forward(
                x, x, gamma, beta, down, inner, up, outer, 1.0, 1e-5, "gelu", self.norm
            )
        else:
            h = meta(torch.float32, self.m, self.rank)
            stats = meta(torch.float32, self.m if normed else 0, 2)
            needs = [True, normed, normed, True, True, True, True]
            run.bottleneck_backward(
                y, x, h, stats, gamma, beta, down, up, 1.0, "gelu", self.norm, True, needs
            )

    def floor(self, direction: str) -> Floor:
        """Forward: x, the parameters and y. Backward: dy, x and dx, the matrices and every
        parameter's gradient. h is neither: it can be made again from x, which is read anyway."""
        rows, matrices = self.m * self.k, 2 * self.rank * self.k
        vectors = self.rank + (1 if self.norm == "none" else 3) * self.k
        size, products = self.dtype.itemsize, 2 * self.m * matrices
        if direction == FORWARD:
            return Floor(size * (2 * rows + matrices + vectors), products)
        return Floor(size * (3 * rows + 2 * matrices + vectors), 2 * products)


@dataclass(frozen=True)
class Norm:
    """``norm_bias``; every gradient is wanted."""

    m: int
    k: int
    norm: str = "layer"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"norm_bias {self.norm} {self.m}×{self.k} {str(self.dtype).removeprefix('torch.')}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        x, y = (meta(self.dtype, self.m, self.k) for _ in range(2))
        gamma, bias = (meta(self.dtype, self.k) for _ in range(2))
        if direction == FORWARD:
            run.norm_bias_forward(x, gamma, bias, 1e-5, self.norm)
        else:
            stats = meta(torch.float32, 0 if self.norm == "none" else self.m, 2)
            run.norm_bias_backward(y, x, stats, gamma, self.dtype, self.norm, [True] * 3)

    def floor(self, direction: str) -> Floor:
        """Forward: x, gamma, bias and y. Backward: dy, x, dx, gamma and two gradients."""
        matrices, vectors = (2, 2) if direction == FORWARD else (3, 3)
        return Floor(self.dtype.itemsize * (matrices * self.m + vectors) * self.k, 0)


@dataclass(frozen=True)
class DoraNorm:
    """``dora_norm``, which has no gradient."""

    n: int
    k: int
    rank: int
    dtype: torch.dtype = torch.bfloat16

    directions: ClassVar = (FORWARD,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"dora_norm {self.n}×{self.k} r={self.rank} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        weight, a = meta(self.dtype, self.n, self.k), meta(self.dtype, self.rank, self.k)
        TritonBackend().dora_norm(weight, a, meta(self.dtype, self.n, self.rank), 2.0)

    def floor(self, direction: str) -> Floor:
        """W, A, B and the norms."""
        n, k, r = self.n, self.k, self.rank
        return Floor(self.dtype.itemsize * (n * k + r * (n + k)) + 4 * n, 2 * n * k * r)


@dataclass(frozen=True)
class Prompt:
    """``prompt_embedding`` of tokens that are all different."""

    b: int
    tokens: int
    d: int
    prompt: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"prompt_embedding B={self.b} P={self.prompt} T={self.tokens} D={self.d} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, rows = TritonBackend(), self.b * self.tokens
        if direction == FORWARD:
            ids, table = meta(torch.int64, self.b, self.tokens), meta(self.dtype, rows, self.d)
            run.prompt_embedding_forward(meta(self.dtype, self.prompt, self.d), ids, table)
        else:
            dy = meta(self.dtype, self.b, self.prompt + self.tokens, self.d)
            run.prompt_embedding_backward(dy, self.prompt, self.dtype)

    def floor(self, direction: str) -> Floor:
        """Forward: the prompt, ids, their rows and y. Backward: dy of the prompt, and its
        gradient."""
        b, p, rows, size = self.b, self.prompt, self.b * self.tokens, self.dtype.itemsize
        if direction == FORWARD:
            return Floor(size * self.d * (p + rows + b * p + rows) + 8 * rows, 0)
        return Floor(size * self.d * (b + 1) * p, 0)


@dataclass(frozen=True)
class Gated:
    """``gated``; both gradients are wanted."""

    m: int
    k: int
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"gated {self.activation} {self.m}×{self.k} {str(self.dtype).removeprefix('torch.')}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, (gate, up) = TritonBackend(), (meta(self.dtype, self.m, self.k) for _ in range(2))
        if direction == FORWARD:
            run.gated_forward(gate, up, self.activation)
        else:
            run.gated_backward(meta(self.dtype, self.m, self.k), gate, up, self.activation,
                               [True, True])  # fmt: skip

    def floor(self, direction: str) -> Floor:
        """Forward: gate, up and y. Backward: those two, dy and two gradients."""
        matrices = 3 if direction == FORWARD else 5
        return Floor(self.dtype.itemsize * matrices * self.m * self.k, 0)


@dataclass(frozen=True)
class Rotary:
    """``rotary`` of H heads, with tables of float32."""

    b: int
    h: int
    length: int
    d: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"rotary B={self.b} H={self.h} L={self.length} D={self.d} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, x = TritonBackend(), meta(self.dtype, self.b, self.h, self.length, self.d)
        cos, sin = (meta(torch.float32, 1, self.length, self.d) for _ in range(2))
        (run.rotary_forward if direction == FORWARD else run.rotary_backward)(x, cos, sin, True)

    def floor(self, direction: str) -> Floor:
        """x and y, or dy and dx, and the angles."""
        heads, angles = 2 * self.b * self.h, 2 * torch.float32.itemsize
        return Floor((self.dtype.itemsize * heads + angles) * self.length * self.d, 0)
