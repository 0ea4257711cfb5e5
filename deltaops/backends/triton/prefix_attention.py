"""``prefix_attention`` in one of two ways, neither of which copies the prefix or the keys.

    fused    one online softmax over the prefix and the keys
    merged   torch's attention to the keys, the prefix merged into it (:mod:`merged_prefix`)

Merged wherever torch has a flash or cuDNN attention that it would choose for the keys
(:mod:`library_attention`), which have nearly all of the FLOPs: on an H200 forward and backward of
2 × 2048 tokens, 32 heads of 128 elements, 8 of keys, and a prefix of 32 take 714 µs, fused 2983.
Each direction chooses for itself, as they may run under other settings: y and lse say the same in
both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaops.backends.calls import PrefixAttentionCall

from . import core, merged_prefix
from .heads import adjacent, by_tokens
from .library_attention import Choice, choose

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


def planned(call: PrefixAttentionCall) -> str:
    """Which way a call goes on the current GPU, and why. The elements of a head are taken to lie
    side by side: the call does not say."""

    def heads(count: int, length: int) -> Tensor:  # one of which all are views: shapes, no memory
        one = torch.empty(call.d, dtype=call.dtype, device=call.device)
        return one.expand(call.b, count, length, call.d)

    q, k = heads(call.h, call.l_q), heads(call.h_kv, call.l_kv)
    choice = _choice(q, k, k, call.prefix, call.masked, call.causal, 1.0)
    if choice.library is None:
        return f"fused: {choice.why}"
    return f"merged, own keys by torch's {choice.library.title}: {choice.why}"


def _choice(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, masked: bool, causal: bool, scale: float
) -> Choice:
    if masked:
        return Choice(None, "a mask is for these kernels alone")
    if not (prefix and q.numel() and k.numel()):
        return Choice(None, "there is nothing to merge")
    return choose(q, k, v, causal, scale)


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
    q, k, v, prefix_k, prefix_v = map(adjacent, (q, k, v, prefix_k, prefix_v))
    choice = _choice(q, k, v, prefix_k.shape[1], mask is not None, causal, scale)
    if choice.library is not None:
        return merged_prefix.forward(choice.library, q, k, v, prefix_k, prefix_v, scale, causal)
    y = by_tokens(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel():
        with core.device_of(q):
            core.kernels("attention").attention(
                q, k, v, prefix_k, prefix_v, _bytes(mask), y, lse,
                scale=scale, causal=causal, **_precisions(q, prefix_k),
                capability=core.capability(q),
            )  # fmt: skip
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
    grad_y, q, k, v, prefix_k, prefix_v, y = map(adjacent, (grad_y, q, k, v, prefix_k, prefix_v, y))
    lse = lse.contiguous()
    choice = _choice(q, k, v, prefix_k.shape[1], mask is not None, causal, scale)
    if choice.library is not None:
        return merged_prefix.backward(
            choice.library, grad_y, q, k, v, prefix_k, prefix_v, y, lse, scale, causal, needs
        )
    grads = [by_tokens(t) if need else None for t, need in zip((q, k, v), needs, strict=False)]
    for t, need in zip((prefix_k, prefix_v), needs[3:], strict=True):
        shape = torch.Size(t.shape)
        grads.append(torch.empty(shape, dtype=t.dtype, device=t.device) if need else None)
    grad_q, grad_k, grad_v, grad_pk, grad_pv = grads
    wanted = [g for g in grads if g is not None]
    if not lse.numel():  # no query: the keys, if there are any, get nothing
        return [g.zero_() for g in wanted]
    mask, delta = _bytes(mask), torch.empty_like(lse)
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
                capability=core.capability(q),
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


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
