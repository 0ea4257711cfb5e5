"""Attention of which a prefix is part, as one op.

    Y = softmax(scale · Q [Pk; K]ᵀ) [Pv; V]

Trained keys and values, the same for the whole batch, before those of each sequence. Neither a copy
of the prefix for each sequence nor one of the sequence's own keys and values with the prefix before
them is made, and no mask grows: all queries see the prefix. Otherwise as
:mod:`deltaops.ops.attention`, with the same two ways in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deltaops.backends import PrefixAttentionCall
from deltaops.dispatch import LAST_RESORT, select
from deltaops.errors import DtypeError, GradientError, ShapeError
from deltaops.reference import prefix_attention as reference
from deltaops.reference.heads import arrange

from .attention_checks import check_heads, checked_scale
from .paths import check_device, needs_grad, takes_bypass, transformed
from .prefix_attention_autograd import Forward, PrefixAttentionFunction, run_forward


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """:func:`~deltaops.ops.attention` with a prefix before the keys and values of each sequence.

    Args:
        q: queries ``[B, H, Lq, D]``, floating point; computed in float32 at least, y rounded once.
            Any strides: heads of adjacent elements are read where they lie.
        k: keys ``[B, Hkv, Lk, D]``, dtype of ``q``; H is a multiple of Hkv, and head h of the
            queries reads head h // (H / Hkv). Lk may be 0.
        v: values, shape and dtype of ``k``.
        prefix_k: keys that every query sees besides, ``[Hkv, P, D]``, P may be 0. Its dtype may be
            another than that of ``q``, but no wider than float32 and ``q`` are: parameters in
            float32 are not rounded for a bfloat16 model.
        prefix_v: their values, shape and dtype of ``prefix_k``.
        mask: bool, ``[B or 1, H or 1, Lq or 1, Lk or 1]``, True where a query sees a key of ``k``;
            the prefix is not in it. It gets no gradient.
        causal: whether query i sees the prefix and keys 0 … i alone (of those that ``mask`` lets it
            see); wants Lq = Lk. With a cache of keys pass a mask; one query that sees them all
            needs neither.
        bias: ``[B or 1, H or 1, Lq or 1, Lk or 1]``, in the dtype of ``q`` or float32, added to the
            scaled scores of ``k``, as T5 has a number for each distance; with P + Lk columns to
            those of the prefix too, which come first. One column is that of all keys of ``k``, and
            of none of the prefix. It is frozen: no gradient is computed, and one that wants it is
            refused. Keys are hidden by -inf or by ``mask``: a row whose every score is near the
            least finite number has no gradient to rely on.
        scale: of the scores; ``D ** -0.5`` where None.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
            Where none takes a call, or torch is faster, "auto" copies the prefix before the keys
            and values and runs torch's scaled_dot_product_attention (the reference, where a
            compiler has the op in its graph).
        strict: with "auto", run a fused backend or raise.
    Returns: ``[B, H, Lq, D]`` in the dtype of ``q``, under autocast too. Its memory is dense and
        ordered ``[B, Lq, H, D]``, as the projection behind it reads it.
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError, GradientError.
    Gradients: ``q``, ``k``, ``v``, ``prefix_k`` and ``prefix_v``, the last two summed over the
        batch and the queries' heads, in an order that no number of threads changes; first order.
        On a GPU, where torch's attention has a part in it (the plan of ``explain_call`` says so),
        those of ``q``, ``k`` and ``v`` repeat their bits under
        ``torch.use_deterministic_algorithms(True)`` alone.
        Kept are these five, y, mask and bias, and a float32 for each query and head.
    Source: Li and Liang 2021 (arXiv 2101.00190); computed as by Dao et al. 2022 (arXiv 2205.14135).
    """
    check_heads("prefix_attention", q, k, v, mask, causal)
    _check_prefix(q, k, prefix_k, prefix_v)
    scale = checked_scale("prefix_attention", scale, q)
    _check_bias(q, k, prefix_k, bias)
    short = mask, bias
    if mask is not None:  # no copy: what is shared has a stride of zero
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if bias is not None:
        bias = bias.expand(*q.shape[:3], _columns(bias, k))
    given = q, k, v, prefix_k, prefix_v
    rest = mask, scale, causal, bias
    if transformed("prefix_attention", backend, strict):
        return reference.forward(*given, *rest)[0]
    if takes_bypass(*given, mask, bias):
        call = PrefixAttentionCall.of(q, k, prefix_k, mask, causal, bias)
        runner = select(call, backend, strict)
        if backend == "auto" and runner.name == LAST_RESORT:
            return _torch(q, k, v, prefix_k, prefix_v, *short, scale, causal)
        if needs_grad(*given):
            y: Tensor = PrefixAttentionFunction.apply(*given, *rest, runner)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return run_forward(runner, Forward(*given, *rest))[0]
    if strict:
        call = PrefixAttentionCall.of(q, k, prefix_k, mask, causal, bias)
        backend = select(call, backend, strict).name
    return torch.ops.deltaops.prefix_attention(*given, *rest, backend)[0]  # type: ignore[no-any-return]  # torch.ops has no types


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Torch's own on copies, which is faster than the reference, with the gradients that it has.

    A bias wider than q is not rounded to it: all is computed in the wider dtype then.
    """
    if bias is not None and bias.dtype is not q.dtype:
        kind, wide = q.dtype, torch.promote_types(bias.dtype, q.dtype)
        q, k, v, prefix_k, prefix_v = (t.to(wide) for t in (q, k, v, prefix_k, prefix_v))
        y = _torch(q, k, v, prefix_k, prefix_v, mask, bias.to(wide), scale, causal)
        return y.to(kind)
    keys, values = reference.join(prefix_k, k), reference.join(prefix_v, v)
    seen = reference.mask_of_both(q, k, prefix_k, mask, causal)
    if bias is not None:
        added = bias.to(q.dtype).expand(*bias.shape[:2], q.shape[2], _columns(bias, k))
        added = reference.grown(added, k, prefix_k)
        seen = added if seen is None else torch.where(seen, added, -torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        y = scaled_dot_product_attention(
            q, keys, values, seen, scale=scale, enable_gqa=k.shape[1] < q.shape[1]
        )
    return arrange(y, True)


def _columns(bias: Tensor, k: Tensor) -> int:
    """Those of a bias, one for each of its keys: a single one is that of all of ``k``, or none."""
    return k.shape[2] if bias.shape[3] == 1 else bias.shape[3]


def _check_bias(q: Tensor, k: Tensor, prefix: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    own = k.shape[2]
    whole = prefix.shape[1] + own
    fits = bias.dim() == 4 and all(
        [size in (1, full) for size, full in zip(bias.shape[:3], q.shape[:3], strict=True)]
    )
    if not fits or bias.shape[3] not in (1, own, whole):
        names = ", ".join(f"{full} or 1" for full in q.shape[:3])
        raise ShapeError(
            f"prefix_attention: bias must be [B, H, Lq, Lk or P + Lk], here [{names}, {own}, "
            f"{whole} or 1], got {list(bias.shape)}."
        )
    if bias.dtype not in (q.dtype, torch.float32):
        raise DtypeError(
            f"prefix_attention: bias must be {q.dtype}, as q is, or torch.float32, got "
            f"{bias.dtype}. Convert it."
        )
    check_device("prefix_attention", "bias", bias, q, of="q")
    if bias.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "prefix_attention: bias must not require a gradient, since the op computes none for "
            "it. Freeze what it comes from, or detach it."
        )


def _check_prefix(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
    h_kv, d = k.shape[1], k.shape[3]
    if prefix_k.dim() != 3 or prefix_k.shape[0] != h_kv or prefix_k.shape[2] != d:
        raise ShapeError(
            f"prefix_attention: prefix_k must be [Hkv, P, D], here [{h_kv}, P, {d}], got "
            f"{list(prefix_k.shape)}. It has the heads of k, and no batch."
        )
    if prefix_v.shape != prefix_k.shape:
        raise ShapeError(
            f"prefix_attention: prefix_v must be {list(prefix_k.shape)}, as prefix_k is, got "
            f"{list(prefix_v.shape)}."
        )
    computed = torch.promote_types(q.dtype, torch.float32)
    wider = torch.promote_types(prefix_k.dtype, computed) != computed
    if wider or not prefix_k.is_floating_point():
        raise DtypeError(
            f"prefix_attention: prefix_k must be floating point and no wider than {computed} with "
            f"q in {q.dtype}, got {prefix_k.dtype}. Convert it."
        )
    if prefix_v.dtype != prefix_k.dtype:
        raise DtypeError(
            f"prefix_attention: prefix_v must be {prefix_k.dtype}, as prefix_k is, got "
            f"{prefix_v.dtype}. Convert one of them."
        )
    check_device("prefix_attention", "prefix_k", prefix_k, q, of="q")
    check_device("prefix_attention", "prefix_v", prefix_v, q, of="q")
