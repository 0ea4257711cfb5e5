"""``prefix_attention``: one online softmax over the prefix and the keys; no copy of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaops.backends.calls import PrefixAttentionCall

from . import core

_WIDEST = {"half": 256, "mixed": 128, "full": 64}
"""Elements of a head that a program has room for: a half model, with a float32 prefix, float32."""

_MOST = 65535
"""Programs along the second axis of a grid in CUDA."""


def unsupported(call: PrefixAttentionCall) -> str | None:
    """None, or what the kernels do not take."""
    if call.biased:
        return "has no bias added to the scores yet"
    for dtype in (call.dtype, call.prefix_dtype):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    if call.b * call.h > _MOST:
        return f"takes at most {_MOST} heads of all sequences, not {call.b * call.h}"
    full = torch.float32
    if call.prefix_dtype not in (call.dtype, full) and call.dtype != full:
        return f"takes a prefix of {call.dtype} or float32 for it, not of {call.prefix_dtype}"
    kind = "full" if call.dtype == full else "mixed" if call.prefix_dtype == full else "half"
    if call.d > _WIDEST[kind]:
        return (
            f"takes heads of up to {_WIDEST[kind]} elements of {call.dtype} with a prefix of "
            f"{call.prefix_dtype}, not {call.d}"
        )
    return None


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
    """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
    assert bias is None  # refused by unsupported()
    y = _by_tokens(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel():
        with core.device_of(q):
            core.kernels("attention").attention(
                *map(_adjacent, (q, k, v, prefix_k, prefix_v)),
                _bytes(mask),
                y,
                lse,
                scale=scale,
                causal=causal,
                **_precisions(q, prefix_k),
            )
    return y, lse


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
    """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
    assert bias is None  # refused by unsupported()
    grads = [_by_tokens(t) if need else None for t, need in zip((q, k, v), needs, strict=False)]
    for t, need in zip((prefix_k, prefix_v), needs[3:], strict=True):
        shape = torch.Size(t.shape)
        grads.append(torch.empty(shape, dtype=t.dtype, device=t.device) if need else None)
    grad_q, grad_k, grad_v, grad_pk, grad_pv = grads
    wanted = [g for g in grads if g is not None]
    if not lse.numel():  # no query: the keys, if there are any, get nothing
        return [g.zero_() for g in wanted]
    grad_y, q, k, v, prefix_k, prefix_v, y = map(
        _adjacent, (grad_y, q, k, v, prefix_k, prefix_v, y)
    )
    mask, lse, delta = _bytes(mask), lse.contiguous(), torch.empty_like(lse)
    precisions = _precisions(q, prefix_k)
    with core.device_of(q):
        kernels = core.kernels("attention_grads")
        kernels.grad_query(
            grad_y, q, k, v, prefix_k, prefix_v, mask, y, lse, delta, grad_q,
            scale=scale, causal=causal, **precisions, capability=core.capability(q),
        )  # fmt: skip
        if (grad_k is not None or grad_v is not None) and k.numel():
            kernels.grad_keys(
                grad_y, q, k, v, mask, lse, delta, grad_k, grad_v,
                scale=scale, causal=causal, precision=precisions["own"],
            )  # fmt: skip
        if (grad_pk is not None or grad_pv is not None) and prefix_k.numel():
            kernels.grad_prefix(
                grad_y, q, prefix_k, prefix_v, lse, delta, grad_pk, grad_pv,
                scale=scale, precision=precisions["prefix"],
            )  # fmt: skip
    return wanted


def _precisions(q: Tensor, prefix: Tensor) -> dict[str, Any]:
    precision = core.kernels("precision").rank_precision
    return {"own": precision(q.dtype, []), "prefix": precision(q.dtype, [prefix])}


def _adjacent(t: Tensor) -> Tensor:
    """With the elements of a head side by side, as the kernels read them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _by_tokens(like: Tensor) -> Tensor:
    """Memory ``[B, L, H, D]`` for a tensor ``[B, H, L, D]``."""
    b, h, l, d = like.shape  # noqa: E741
    return torch.empty((b, l, h, d), dtype=like.dtype, device=like.device).transpose(1, 2)
