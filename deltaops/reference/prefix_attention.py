"""Attention with a prefix   (Li and Liang 2021, §4.2)

    Y, lse = attention(Q, [Pk; K], [Pv; V]);   dPk = Σ_b the first P rows of d[Pk; K], so dPv

q, y [B,H,Lq,D]  k, v [B,Hkv,Lk,D]  prefix_k, prefix_v [Hkv,P,D]  lse [B,H,Lq]
The batch shares the prefix and every query sees it, whatever the mask [B or 1,H or 1,Lq,Lk] and
causality say of the rest. A bias [B or 1,H or 1,Lq,Lk or P + Lk] is added to the scores, those of
the prefix too if it has columns for it; it has no gradient. All in float32 at least, each result
rounded once. See :mod:`deltaops.reference.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention
from .heads import arrange


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, H, Lq, D] in [B, Lq, H, D] memory, lse [B, H, Lq] float32 or float64)``."""
    seen = mask_of_both(q, k, prefix_k, mask, causal)
    y, lse = attention.forward(
        wide(q), join(prefix_k, wide(k)), join(prefix_v, wide(v)), seen, scale, False,
        None if bias is None else grown(bias, k, prefix_k),
    )  # fmt: skip
    return arrange(y.to(q.dtype), True), lse


def backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
    bias: Tensor | None = None,
) -> list[Tensor]:
    """The wanted ones of the gradients of q, k, v, each in ``[B, L, H, D]`` memory, and of
    prefix_k, prefix_v."""
    length, seen = prefix_k.shape[1], mask_of_both(q, k, prefix_k, mask, causal)
    grad_q, grad_k, grad_v = attention.backward(
        wide(grad_y), wide(q), join(prefix_k, wide(k)), join(prefix_v, wide(v)), wide(y), lse,
        seen, scale, False, (True, True, True),
        None if bias is None else grown(bias, k, prefix_k),
    )  # fmt: skip
    own = [grad_q, grad_k[:, :, length:], grad_v[:, :, length:]]
    grads = [arrange(g.to(t.dtype), True) for g, t in zip(own, (q, k, v), strict=True)]
    for g, t in ((grad_k, prefix_k), (grad_v, prefix_v)):
        grads.append(g[:, :, :length].sum(0).to(t.dtype).contiguous())
    return [g for g, need in zip(grads, needs, strict=True) if need]


def wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def join(prefix: Tensor, own: Tensor) -> Tensor:
    """``[B, Hkv, P + Lk, D]`` in the dtype of ``own``: the prefix before what each sequence has."""
    return torch.cat([prefix.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], 2)


def mask_of_both(
    q: Tensor, k: Tensor, prefix: Tensor, mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Which query sees what ``[…, Lq, P + Lk]``, or None where all see all."""
    if causal:
        earlier = q.new_ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool).tril()
        mask = earlier if mask is None else earlier & mask
    if mask is None:
        return None
    seen = mask.expand(*mask.shape[:3], k.shape[2])
    return torch.cat([seen.new_ones((*seen.shape[:3], prefix.shape[1])), seen], 3)


def grown(bias: Tensor, k: Tensor, prefix: Tensor) -> Tensor:
    """What is added to scores ``[…, Lq, P + Lk]``: nothing to a prefix's without columns for it."""
    if bias.shape[3] == prefix.shape[1] + k.shape[2]:
        return bias
    return torch.cat([bias.new_zeros((*bias.shape[:3], prefix.shape[1])), bias], 3)
