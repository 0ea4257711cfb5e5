"""Attention with a prefix on a GPU, beside attention without one and the prefix copied before.

The latter is what prefix tuning costs in plain torch: keys and values are written anew, expanded
over the batch, and a mask lets every query see the prefix. Beside a mask each query's head gets its
keys repeated, as transformers does: torch has grouped heads with a mask in its slowest kernel only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.backends import PrefixAttentionCall
from deltaops.dispatch import explain_call
from deltaops.ops import prefix_attention
from deltaops.reference import prefix_attention as reference
from deltaops.testing import assert_accurate

from .gpu_subject import FROZEN, OURS, Peers, how_many

JOINED = "joined and masked"


@dataclass(frozen=True)
class Attended:
    """One copy of what a call reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    grad_y: Tensor

    def back(self, y: Tensor, *prefix: Tensor) -> list[Tensor]:
        """y, and the gradients of q, k, v and, where given, the prefix."""
        return [y, *torch.autograd.grad(y, [self.q, self.k, self.v, *prefix], self.grad_y)]


@dataclass(frozen=True)
class PrefixCase:
    """B sequences of L tokens, causal; H heads of D elements on Hkv; a prefix of P. Both ways."""

    op: ClassVar[str] = "prefix_attention"

    b: int
    h: int
    h_kv: int
    length: int
    d: int
    prefix: int

    def __str__(self) -> str:
        return f"{self.b}×{self.h}:{self.h_kv}×{self.length}×{self.d} P={self.prefix}"

    def facts(self) -> dict[str, Any]:
        """See :class:`Subject`."""
        shape = [self.b, self.h, self.h_kv, self.length, self.d]
        return {"shape": shape, "prefix": self.prefix, "backward": True}

    def operands(self, device: str, cache_bytes: float) -> list[Attended]:
        """See :class:`Subject`."""
        one = 2 * 2 * self.b * self.length * self.d * (self.h + self.h_kv)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        def heads(count: int) -> Tensor:  # as a projection leaves them
            return normal(self.b, self.length, count, self.d).transpose(1, 2).requires_grad_()

        def prefix() -> Tensor:
            return normal(self.h_kv, self.prefix, self.d).requires_grad_()

        return [
            Attended(
                heads(self.h), heads(self.h_kv), heads(self.h_kv), prefix(), prefix(),
                heads(self.h).detach(),
            )
            for _ in range(how_many(one, cache_bytes))
        ]  # fmt: skip

    def gate(self, copy: Attended, backend: str) -> None:
        """See :class:`Subject`. One sequence: the scores of all would be gigabytes in float64."""
        q, k, v = (t[:1].detach().requires_grad_() for t in (copy.q, copy.k, copy.v))
        grad_y = copy.grad_y[:1]
        one = Attended(q, k, v, copy.prefix_k, copy.prefix_v, grad_y)
        names = ("y", "grad q", "grad k", "grad v", "grad prefix k", "grad prefix v")
        wanted = []
        with torch.no_grad():
            for kind in (torch.float64, q.dtype):
                q_, k_, v_, pk, pv = (t.to(kind) for t in (q, k, v, copy.prefix_k, copy.prefix_v))
                scale, needs, dy = self.d**-0.5, [True] * 5, grad_y.to(kind)
                y, lse = reference.forward(q_, k_, v_, pk, pv, None, scale, True)
                grads = reference.backward(dy, q_, k_, v_, pk, pv, y, lse, None, scale, True, needs)
                wanted.append([y, *grads])
        for peer, got in ((OURS, ours(backend, one)), (JOINED, joined(one))):
            for name, value, oracle, low in zip(names, got, *wanted, strict=True):
                assert_accurate(value, oracle, low, f"{self}: {peer}: {name}")

    def peers(
        self, copies: list[Attended], backend: str, compile_peft: bool
    ) -> tuple[Peers, dict[str, str]]:
        """See :class:`Subject`."""
        return {
            FROZEN: [partial(without, o) for o in copies],
            OURS: [partial(ours, backend, o) for o in copies],
            JOINED: [partial(joined, o) for o in copies],
        }, {}

    def plan(self, copy: Attended, backend: str) -> str | None:
        """See :class:`Subject`."""
        call = PrefixAttentionCall.of(copy.q, copy.k, copy.prefix_k, None, True)
        return explain_call(call, backend).plan


def without(copy: Attended) -> list[Tensor]:
    """Torch's attention, no prefix."""
    y = functional.scaled_dot_product_attention(
        copy.q, copy.k, copy.v, is_causal=True, enable_gqa=True
    )
    return copy.back(y)


def ours(backend: str, copy: Attended) -> list[Tensor]:
    """One op."""
    prefix = copy.prefix_k, copy.prefix_v
    y = prefix_attention(copy.q, copy.k, copy.v, *prefix, causal=True, backend=backend)
    return copy.back(y, *prefix)


def joined(copy: Attended) -> list[Tensor]:
    """The prefix copied before the keys and values of each sequence, and a mask."""
    (b, h, length, _), h_kv = copy.q.shape, copy.k.shape[1]
    k, v = (
        torch.cat([prefix.expand(b, -1, -1, -1), rest], 2).repeat_interleave(h // h_kv, 1)
        for prefix, rest in ((copy.prefix_k, copy.k), (copy.prefix_v, copy.v))
    )
    mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=k.device)
    y = functional.scaled_dot_product_attention(
        copy.q, k, v, attn_mask=mask.tril(k.shape[2] - length)
    )
    return copy.back(y, copy.prefix_k, copy.prefix_v)
