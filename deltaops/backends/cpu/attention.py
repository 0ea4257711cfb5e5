"""``attention`` in the native core, which has one body with a prefix and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaops.backends.calls import AttentionCall

from .core import DTYPES, core
from .heads import as_heads, as_tables, empty_heads, placed, table_strides

SHORT = 48
"""Fewer queries of an attention fill no block of the core's: measured with AVX2 and two threads,
torch is faster below, and we are from there on. In bfloat16 torch's backward pass is so much slower
there that only where keys are few, too, it is ahead."""


Prefix = tuple[Tensor, Tensor]
"""Keys and values ``[Hkv, P, D]`` of one dtype, for the whole batch."""
Tables = tuple[Tensor, Tensor]
"""cos and sin ``[B or 1, L, D]``, by which queries and keys are turned first."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    prefix: Prefix | None = None,
    bias: Tensor | None = None,
    tables: Tables | None = None,
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.AttentionBackend`, and :mod:`.prefix_attention`."""
    held = _adjacent(prefix) if prefix else None  # a copy must outlive the call
    more = _placed_prefix(held) if held else ()
    tables = as_tables(*tables) if tables else None
    q, k, v, mask, bias = as_heads(q), as_heads(k), as_heads(v), _bytes(mask), _floats(bias)
    y = empty_heads(q.shape, True, q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    core().attention_forward(
        DTYPES[q.dtype],
        (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]),
        *placed(q),
        *placed(k),
        *placed(v),
        *_placed_mask(mask),
        *placed(y),
        lse.data_ptr(),
        scale,
        causal,
        torch.get_num_threads(),
        *more,
        **_biased(bias, prefix, k.shape[2]),
        **_turned(tables),
    )
    return y, lse


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
    prefix: Prefix | None = None,
    bias: Tensor | None = None,
    tables: Tables | None = None,
) -> list[Tensor]:
    """The same; with a prefix ``needs`` goes on for its two gradients."""
    grad_y, q, k, v, y = [as_heads(t) for t in (grad_y, q, k, v, y)]
    mask, lse, bias = _bytes(mask), lse.contiguous(), _floats(bias)
    tables = as_tables(*tables) if tables else None
    wanted = [
        empty_heads(t.shape, True, t.dtype) if need else None
        for t, need in zip((q, k, v), needs[:3], strict=True)
    ]
    more: tuple[Any, ...] = ()
    if prefix:
        prefix = _adjacent(prefix)
        wanted += [
            torch.empty(t.shape, dtype=t.dtype) if need else None
            for t, need in zip(prefix, needs[3:], strict=True)
        ]
        more = *_placed_prefix(prefix), *[0 if t is None else t.data_ptr() for t in wanted[3:]]
    core().attention_backward(
        DTYPES[q.dtype],
        (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]),
        *placed(grad_y),
        *placed(q),
        *placed(k),
        *placed(v),
        *_placed_mask(mask),
        *placed(y),
        lse.data_ptr(),
        *placed(wanted[0]),
        *placed(wanted[1]),
        *placed(wanted[2]),
        scale,
        causal,
        torch.get_num_threads(),
        *more,
        **_biased(bias, prefix, k.shape[2]),
        **_turned(tables),
    )
    return [g for g in wanted if g is not None]


def rotary_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.RotaryAttentionBackend`."""
    return forward(q, k, v, mask, scale, causal, tables=(cos, sin))


def rotary_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.RotaryAttentionBackend`."""
    given = grad_y, q, k, v, y, lse, mask, scale, causal, needs
    return backward(*given, tables=(cos, sin))


def _adjacent(prefix: Prefix) -> Prefix:
    """With adjacent elements in a head; copies only where they must be."""
    prefix_k, prefix_v = [t if t.stride(2) == 1 else t.contiguous() for t in prefix]
    return prefix_k, prefix_v


def _placed_prefix(prefix: Prefix) -> tuple[Any, ...]:
    """Dtype, length, and where the two tensors lie."""
    where = [x for t in prefix for x in (t.data_ptr(), t.stride()[:2])]
    return (DTYPES[prefix[0].dtype], prefix[0].shape[1], *where)


def _placed_mask(mask: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0, 0)) if mask is None else (mask.data_ptr(), _steps(mask))


def _steps(pairs: Tensor) -> tuple[int, ...]:
    """Strides; torch leaves that of a single key open, and the core takes 0 and 1."""
    return pairs.stride() if pairs.shape[3] != 1 else (*pairs.stride()[:3], 0)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A mask whose keys lie side by side, or are all the same."""
    if mask is None or mask.stride(3) in (0, 1) or mask.shape[3] == 1:
        return mask
    return _once(mask).contiguous().expand(mask.shape)


def _floats(bias: Tensor | None) -> Tensor | None:
    """A bias in float32, otherwise as :func:`_bytes`."""
    if bias is None or bias.dtype == torch.float32:
        return _bytes(bias)
    return _once(bias).to(torch.float32, memory_format=torch.contiguous_format).expand(bias.shape)


def _once(pairs: Tensor) -> Tensor:
    """Without what strides of zero repeat."""
    return pairs[tuple([slice(None if step else 1) for step in pairs.stride()])]


def _biased(bias: Tensor | None, prefix: Prefix | None, keys: int) -> dict[str, Any]:
    """The arguments of a bias, whose memory the caller holds."""
    if bias is None:
        return {}
    length = prefix[0].shape[1] if prefix else 0
    first = 0 if bias.shape[3] == length + keys else length
    return {"bias": bias.data_ptr(), "bias_strides": _steps(bias), "bias_from": first}


def _turned(tables: Tables | None) -> dict[str, Any]:
    """The arguments of angles, whose memory the caller holds."""
    if tables is None:
        return {}
    cos, sin = tables
    return {
        "table_dtype": DTYPES[cos.dtype],
        "cos": cos.data_ptr(),
        "sin": sin.data_ptr(),
        "table_strides": table_strides(cos),
    }


def outrun(call: AttentionCall) -> str | None:
    """None, or where torch's own attention is faster."""
    what, length = ("queries", call.l_q) if call.dtype == torch.float32 else ("keys", call.l_kv)
    if length >= SHORT:
        return None
    return f"torch's scaled_dot_product_attention is faster below {SHORT} {what}, here {length}"
