"""``rotary`` and ``attention`` and their gradients, on arrays ``[B, H, L, D]``.

Axes before the last may have any strides, so ``[B, L, H, D]`` memory goes in transposed; results
are contiguous ``[B, H, L, D]``, or go where ``out`` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deltaops.bindings.settings import attention_scale, check_heads, threads
from deltaops.errors import ShapeError

from .arrays import (
    Array,
    address,
    call,
    check,
    code,
    core,
    gradients,
    output,
    strides,
)

Placed = tuple[int, tuple[int, ...]]


def rotary(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    backward: bool = False,
    num_threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Rotary position embedding, D cut into halves as Llama has it.

    Args:
        x: ``[B, H, L, D]`` float32 or bfloat16, D even.
        cos: ``[B or 1, L, D]``, float32 or the dtype of ``x``.
        sin: alike.
        backward: x is the gradient of the result, and the result that of x.
        num_threads: None: all processors.
        out: ``[B, H, L, D]``, contiguous, or None.
    Raises: DtypeError, ShapeError, LayoutError.
    """
    op = "rotary"
    x = check(op, "x", x, (None,) * 4, strided=True)
    batch, _, length, d = x.shape
    if d < 2 or d % 2:
        raise ShapeError(f"{op}: x must be [B, H, L, D] with D even, got {list(x.shape)}.")
    like = "float32" if x.dtype == np.float32 else None  # or that of x
    cos = check(op, "cos", cos, (None, length, d), like)
    sin = check(op, "sin", sin, cos.shape, cos)
    if cos.shape[0] not in (1, batch):
        raise ShapeError(f"{op}: cos must be [{batch} or 1, {length}, {d}], got {list(cos.shape)}.")
    y = output(op, "out", out, x.shape, x.dtype)
    shared = cos.shape[0] == 1
    call(
        core().rotary,
        code(x),
        x.shape,
        *_placed(x),
        *_placed(y),
        code(cos),
        address(cos),
        address(sin),
        (0 if shared else strides(cos)[0], strides(cos)[1]),
        backward,
        threads(num_threads),
    )
    return y


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
    bias: Array | None = None,
    num_threads: int | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """Softmax attention, with trained keys and values before the sequence's own where given.

    Args:
        q: ``[B, H, Lq, D]`` float32 or bfloat16.
        k: ``[B, Hkv, Lk, D]``; H / Hkv neighbouring heads of queries share one.
        v: as ``k``.
        scale: of the scores; None: 1 / √D.
        causal: query i sees keys 0 … i; Lq = Lk.
        mask: bool ``[B or 1, H or 1, Lq or 1, Lk or 1]``, contiguous: True where a query sees a
            key.
        prefix: keys and values ``[Hkv, P, D]``, contiguous, which every query sees.
        bias: float32 ``[B or 1, H or 1, Lq or 1, …]``, contiguous, added to the scores: Lk columns
            (or 1) for the sequence's own keys, or P + Lk for those of the prefix too. It has no
            gradient.
        num_threads: None: all processors.
        out: y and lse, contiguous, either of them None.
    Returns: y ``[B, H, Lq, D]`` in the dtype of ``q``; lse ``[B, H, Lq]`` float32, for the backward
        pass.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "attention"
    q, k, v, sizes = _heads(op, q, k, v, causal)
    given = out or (None, None)
    y = output(op, "out", given[0], q.shape, q.dtype)
    lse = output(op, "out", given[1], q.shape[:3], np.float32)
    call(
        core().attention_forward,
        code(q),
        sizes,
        *_placed(q),
        *_placed(k),
        *_placed(v),
        *_mask(op, mask, q, k),
        *_placed(y),
        address(lse),
        attention_scale(op, scale, q.shape),
        causal,
        threads(num_threads),
        *_prefix(op, prefix, k),
        **_bias(op, bias, q, k, prefix),
    )
    return y, lse


def attention_backward(
    grad_y: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    lse: Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
    bias: Array | None = None,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "q", "k", "v", and with a prefix "prefix_k" and "prefix_v".

    Args:
        grad_y: ``[B, H, Lq, D]``.
        q, k, v, scale, causal, mask, prefix, bias: as in the forward pass.
        y: what the forward pass returned.
        lse: so too.
        wanted: names; None: all.
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name, contiguous.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    op = "attention"
    q, k, v, sizes = _heads(op, q, k, v, causal)
    grad_y = check(op, "grad_y", grad_y, q.shape, q, strided=True)
    y = check(op, "y", y, q.shape, q, strided=True)
    lse = check(op, "lse", lse, q.shape[:3], "float32")
    before = _prefix(op, prefix, k)
    named: dict[str, Array] = {"q": q, "k": k, "v": v}
    if prefix is not None:
        named |= {"prefix_k": prefix[0], "prefix_v": prefix[1]}
    found = gradients(op, {n: (a.shape, a.dtype) for n, a in named.items()}, wanted, out)
    into = [address(found.get(name)) for name in ("prefix_k", "prefix_v")]
    call(
        core().attention_backward,
        code(q),
        sizes,
        *_placed(grad_y),
        *_placed(q),
        *_placed(k),
        *_placed(v),
        *_mask(op, mask, q, k),
        *_placed(y),
        address(lse),
        *_placed(found.get("q")),
        *_placed(found.get("k")),
        *_placed(found.get("v")),
        attention_scale(op, scale, q.shape),
        causal,
        threads(num_threads),
        *before,
        *(into if before else ()),
        **_bias(op, bias, q, k, prefix),
    )
    return found


def _heads(
    op: str, q: Array, k: Array, v: Array, causal: bool
) -> tuple[Array, Array, Array, tuple[int, ...]]:
    """The three, checked, and B, H, Hkv, Lq, Lk, D."""
    q = check(op, "q", q, (None,) * 4, strided=True)
    batch, heads, length, d = q.shape
    k = check(op, "k", k, (batch, None, None, d), q, strided=True)
    check_heads(op, q.shape, k.shape, causal)
    v = check(op, "v", v, k.shape, q, strided=True)
    return q, k, v, (batch, heads, k.shape[1], length, k.shape[2], d)


def _placed(a: Array | None) -> Placed:
    """Address and strides of the batch, the head and the token."""
    return (0, (0, 0, 0)) if a is None else (address(a), strides(a)[:3])


def _mask(op: str, mask: Array | None, q: Array, k: Array) -> tuple[int, tuple[int, ...]]:
    if mask is None:
        return 0, (0, 0, 0, 0)
    mask = check(op, "mask", mask, (None,) * 4, "bool")
    full = (*q.shape[:3], k.shape[2])
    if any(size not in (1, all_) for size, all_ in zip(mask.shape, full, strict=True)):
        raise ShapeError(
            f"{op}: mask must be {list(full)}, or 1 in any axis; got {list(mask.shape)}."
        )
    return address(mask), _broadcast(mask)


def _bias(
    op: str, bias: Array | None, q: Array, k: Array, prefix: tuple[Array, Array] | None
) -> dict[str, Any]:
    """Where it lies, and the first key that it is added to, of prefix and sequence."""
    if bias is None:
        return {}
    bias = check(op, "bias", bias, (None,) * 4, "float32")
    start = 0 if prefix is None else prefix[0].shape[1]
    full, (*lead, columns) = (*q.shape[:3], k.shape[2]), bias.shape
    fits = all(size in (1, all_) for size, all_ in zip(lead, full, strict=False))
    if not fits or columns not in (1, full[3], start + full[3]):
        raise ShapeError(
            f"{op}: bias must be {list(full)}, or 1 in any axis, or with {start + full[3]} columns "
            f"for the prefix too; got {list(bias.shape)}."
        )
    start = 0 if columns == start + full[3] else start
    return {"bias": address(bias), "bias_strides": _broadcast(bias), "bias_from": start}


def _broadcast(a: Array) -> tuple[int, ...]:
    """Strides, 0 where one element serves all."""
    steps = zip(a.shape, strides(a), strict=True)
    return tuple(0 if size == 1 else step for size, step in steps)


def _prefix(op: str, prefix: tuple[Array, Array] | None, k: Array) -> tuple[Any, ...]:
    """Dtype, length, and where the two arrays lie."""
    if prefix is None:
        return ()
    first = check(op, "prefix[0]", prefix[0], (k.shape[1], None, k.shape[3]))
    second = check(op, "prefix[1]", prefix[1], first.shape, first)
    where = [x for a in (first, second) for x in (address(a), strides(a)[:2])]
    return (code(first), first.shape[1], *where)
