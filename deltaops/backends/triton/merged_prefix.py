"""``prefix_attention`` in two parts: torch's attention to the own keys, kernels for the prefix.

The parts are merged by their log-sum-exps. Torch's backward pass gets the merged y and lse, with
which its gradients are those of the whole softmax, and the prefix's part of dq is added to its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import core, heads
from .library_attention import Library


def forward(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``(y, lse)``. D of every tensor lies side by side."""
    own, lse = library.forward(q, k, v, causal, scale)
    y = own if heads.is_by_tokens(own) else heads.by_tokens(own)
    with core.device_of(q):
        core.kernels("prefix").merge_prefix(
            q, prefix_k, prefix_v, heads.adjacent(own), lse, y, lse,
            scale=scale, precision=_precision(q, prefix_k),
        )  # fmt: skip
    return y, lse


def backward(
    library: Library,
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients. D of every tensor lies side by side, and lse is contiguous.

    Torch's pass has no gradient of its own for q alone, or for k and v: it makes all three where
    one is wanted.
    """
    own: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]):
        own = library.backward(grad_y, q, k, v, y, lse, causal, scale)
    grad_q, grad_k, grad_v = (g if need else None for g, need in zip(own, needs, strict=False))
    part = grad_q
    if grad_q is not None:
        part = heads.adjacent(grad_q)
        grad_q = grad_q if heads.is_by_tokens(grad_q) else heads.by_tokens(grad_q)
    prefix: list[Tensor | None] = []
    for t, need in zip((prefix_k, prefix_v), needs[3:], strict=True):
        shape = torch.Size(t.shape)
        prefix.append(torch.empty(shape, dtype=t.dtype, device=t.device) if need else None)
    if any(g is not None for g in (grad_q, *prefix)):
        with core.device_of(q):
            core.kernels("prefix").prefix_grads(
                grad_y, q, prefix_k, prefix_v, y, lse, part, grad_q, *prefix,
                scale=scale, precision=_precision(q, prefix_k),
            )  # fmt: skip
    arranged = [None if g is None else heads.arranged(g) for g in (grad_k, grad_v)]
    return [g for g in (grad_q, *arranged, *prefix) if g is not None]


def _precision(q: Tensor, prefix: Tensor) -> object:
    return core.kernels("precision").rank_precision(q.dtype, [prefix])
