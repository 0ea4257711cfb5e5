"""Scaled dot-product attention   (Vaswani et al. 2017; heads shared as in Ainslie et al. 2023)

    S = scale · Q Kᵀ,   lse = log Σ exp S,   P = exp(S − lse),   Y = P V
    dV = Pᵀ dY,   dS = P ∘ (dY Vᵀ − δ),   δ = Σ dY ∘ Y,   dQ = scale · dS K,   dK = scale · dSᵀ Q

q, y [B,H,Lq,D]  k, v [B,Hkv,Lk,D]  mask [B or 1,H or 1,Lq,Lk], True where a query sees a key
lse [B,H,Lq]. Query head h reads key head h // (H / Hkv). A bias [B or 1,H or 1,Lq,Lk] is added to
S, if there is one; it has no gradient. The sums are over the keys that a query
sees; one that sees none has lse = ∞, P = 0, y = 0 and hands no gradient on. Backward makes P again
from lse, and δ from the rounded y (Dao et al. 2022). Computed in float32 at least and rounded once.

Keys are hidden by −∞ or the mask. Where every score of a row is near the least finite number lse
swallows log n: y is right, but P of the backward pass is not, and the row has no useful gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .heads import arrange


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, H, Lq, D] in [B, Lq, H, D] memory, lse [B, H, Lq] float32 or float64)``."""
    queries, keys, values = _wide(q, k.shape[1]), _wide(k), _wide(v)
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(queries, keys, mask, scale, causal, bias)
        lse = torch.logsumexp(scores, -1)
        blind = lse == -torch.inf
        lse = lse.masked_fill(blind, torch.inf)
        p = torch.softmax(scores, -1).masked_fill(blind.unsqueeze(-1), 0.0)
        y = torch.einsum("bkgij,bkjd->bkgid", p, values)
    return arrange(y.reshape(q.shape).to(q.dtype), True), lse.reshape(q.shape[:3])


def backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
    bias: Tensor | None = None,
) -> list[Tensor]:
    """The wanted ones of the gradients of q, k, v, each in ``[B, L, H, D]`` memory."""
    queries, keys, values = _wide(q, k.shape[1]), _wide(k), _wide(v)
    grad, result = _wide(grad_y, k.shape[1]), _wide(y, k.shape[1])
    wanted = []
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(queries, keys, mask, scale, causal, bias)
        p = torch.exp(scores - lse.reshape(scores.shape[:-1]).unsqueeze(-1))
        delta = (grad * result).sum(-1, keepdim=True)
        grad_scores = p * (torch.einsum("bkgid,bkjd->bkgij", grad, values) - delta)
        if needs[0]:
            wanted.append((scale * torch.einsum("bkgij,bkjd->bkgid", grad_scores, keys), q))
        if needs[1]:
            wanted.append((scale * torch.einsum("bkgij,bkgid->bkjd", grad_scores, queries), k))
        if needs[2]:
            wanted.append((torch.einsum("bkgij,bkgid->bkjd", p, grad), v))
    return [arrange(t.reshape(like.shape).to(like.dtype), True) for t, like in wanted]


def _wide(t: Tensor, groups: int = 0) -> Tensor:
    """In float32 at least; ``[B, H, L, D]`` as ``[B, groups, H / groups, L, D]`` where asked."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    b, h, l, d = t.shape  # noqa: E741
    return t.reshape(b, groups, h // groups, l, d) if groups else t


def _scores(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    bias: Tensor | None,
) -> Tensor:
    """``[B, Hkv, G, Lq, Lk]``, minus infinity where a query does not see a key."""
    scores = scale * torch.einsum("bkgid,bkjd->bkgij", queries, keys)
    b, groups, each, lq, lk = scores.shape
    if bias is not None:
        added = bias.to(scores.dtype).expand(b, groups * each, lq, lk)
        scores = scores + added.reshape(scores.shape)
    if causal:
        hidden = torch.ones((lq, lk), dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        seen = mask.expand(b, groups * each, lq, lk).reshape(scores.shape)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores
