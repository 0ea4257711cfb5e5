"""Scaled dot-product attention, as one op.

    Y = softmax(scale · Q Kᵀ) V

Heads are read and written in the strides that projections have, keys and values that several heads
of queries share are read where they lie, and a mask stays boolean. The scores are never kept: the
backward pass makes them again from the sums of their exponentials. Two ways in, as
:mod:`deltaops.ops.delta_linear` has them: an ``autograd.Function`` for eager calls, the registered
op ``deltaops::attention`` for everything else.

Where queries and keys are to be turned by their positions first, a backend may do both in one pass;
elsewhere :func:`deltaops.ops.rotary` runs before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deltaops.backends import AttentionCall
from deltaops.dispatch import LAST_RESORT, select
from deltaops.reference import attention as reference
from deltaops.reference.heads import arrange

from .attention_autograd import AttentionFunction, run_turned
from .attention_checks import check_heads, checked_scale
from .paths import needs_grad, takes_bypass, transformed
from .rotary import check_angles, rotary
from .rotary_autograd import call_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tables: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Average ``v`` by the softmax of what ``q`` and ``k`` have in common, each head on its own.

    Args:
        q: queries ``[B, H, Lq, D]``, floating point; computed in float32 at least, y rounded once.
            Any strides: heads of adjacent elements are read where they lie.
        k: keys ``[B, Hkv, Lk, D]``, dtype of ``q``; H is a multiple of Hkv, and head h of the
            queries reads head h // (H / Hkv).
        v: values, shape and dtype of ``k``.
        tables: cos and sin, as :func:`deltaops.ops.rotary` takes them: q and k are turned by them
            first; wants Lq = Lk. Rounded in between only where no backend does both in one pass.
        mask: bool, ``[B or 1, H or 1, Lq or 1, Lk or 1]``, True where a query sees a key; it gets
            no gradient.
        causal: whether query i sees keys 0 … i alone (of those that ``mask`` lets it see); wants
            Lq = Lk.
        scale: of the scores; ``D ** -0.5`` where None.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
            Where none takes a call, or torch is faster, "auto" runs torch's own
            scaled_dot_product_attention (the reference, where a compiler has the op in its graph).
        strict: with "auto", run a fused backend or raise.
    Returns: ``[B, H, Lq, D]`` in the dtype of ``q``, under autocast too; zeros for a query that
        sees no key. Its memory is dense and ordered ``[B, Lq, H, D]``, as the projection behind it
        reads it.
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError; with tables
        GradientError, too.
    Gradients: ``q``, ``k`` and ``v``; first order. Kept are these three, y, the mask, the tables,
        and a float32 for each query and head; where no backend does both in one pass, q and k
        turned.
    Source: Vaswani et al. 2017 (arXiv 1706.03762); computed as by Dao et al. 2022 (arXiv
        2205.14135), heads shared as by Ainslie et al. 2023 (arXiv 2305.13245).
    """
    check_heads("attention", q, k, v, mask, causal)
    cos = sin = None
    if tables is not None:
        if _turns(q, k, v, mask, causal, tables, backend, strict):
            cos, sin = tables
        else:
            q, k = [rotary(t, *tables, backend=backend, strict=strict) for t in (q, k)]
    scale = checked_scale("attention", scale, q)
    if mask is not None:  # no copy: what is shared has a stride of zero
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if transformed("attention", backend, strict):
        return reference.forward(q, k, v, mask, scale, causal)[0]
    if takes_bypass(q, k, v, mask):
        runner = select(AttentionCall.of(q, k, mask, causal), backend, strict)
        if backend == "auto" and runner.name == LAST_RESORT:
            return _torch(q, k, v, mask, scale, causal)
        if needs_grad(q, k, v):
            y: Tensor = AttentionFunction.apply(q, k, v, cos, sin, mask, scale, causal, runner)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return run_turned(q, k, v, cos, sin, mask, scale, causal, runner)[0]
    if strict:
        backend = select(AttentionCall.of(q, k, mask, causal), backend, strict).name
    return torch.ops.deltaops.attention(q, k, v, mask, scale, causal, backend)[0]  # type: ignore[no-any-return]  # torch.ops has no types


def _turns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    tables: tuple[Tensor, Tensor],
    backend: str,
    strict: bool,
) -> bool:
    """Whether one backend runs all of it in one pass.

    Raises: as :func:`deltaops.ops.rotary`.
    """
    for t in (q, k):
        check_angles(t, *tables)
    if not takes_bypass(q, k, v, mask, *tables) or transformed("attention", backend, strict):
        return False
    runner = select(AttentionCall.of(q, k, mask, causal), backend, strict)
    same = [select(call_of(t, tables[0]), backend, strict) is runner for t in (q, k)]
    return all(same) and hasattr(runner, "rotary_attention_forward")


def _torch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Torch's own, which is faster than the reference, with the gradients that it has."""
    if causal and mask is not None:  # it takes one of them
        mask, causal = mask & mask.new_ones(mask.shape[2:]).tril(), False
    with torch.autocast(q.device.type, enabled=False):
        y = scaled_dot_product_attention(
            q, k, v, mask, scale=scale, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1]
        )
    return arrange(y, True)
