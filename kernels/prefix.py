"""The prefix's part of an attention whose other keys somebody else attends to

    S = s · Q Pkᵀ,   lse' = log(exp lse + Σ exp S),   Y' = exp(lse - lse') Y + exp(S - lse') Pv
    P = exp(S - lse'),   δ = Σ dY ∘ Y',   dS = P ∘ (dY Pvᵀ - δ)
    dQ' = dQ + s · dS Pk,   dPk = s · dSᵀ Q,   dPv = Pᵀ dY

    q, y, dy [B,H,Lq,D]  prefix_k, prefix_v [Hkv,P,D]  lse [B,H,Lq] fp32

Two softmaxes merge by their log-sum-exps (Milakov and Gimelshein 2018). A backward pass over the
other keys that is given the merged Y' and lse' is exact: its P and δ are those of the whole, so its
dQ, dK and dV are the other keys' share. Forward: q and y are read once, y is written once.
Backward: dy, q, y and dq are read once, dq is written once; a program that has the whole prefix in
registers sums dPk and dPv beside it, for a piece of the queries of one head of keys, and the
pieces' sums are added in a fixed order. A longer prefix is walked over, and its dPk and dPv are
left to attention_grads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_configs, configs
from .attention import over_keys
from .attention_grads import grad_prefix, query_over_keys
from .precision import Precision
from .tiles import load_tile, store_tile


@triton.jit
def _merge_prefix_kernel(
    q,
    prefix_k,
    prefix_v,
    own,
    norm,
    y,
    lse,
    H,
    group,
    Lq,
    P,
    D,
    q_batch,
    q_head,
    q_row,
    pk_head,
    pk_row,
    pv_head,
    pv_row,
    own_batch,
    own_head,
    own_row,
    y_batch,
    y_head,
    y_row,
    scale,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    kv = h // group
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    tile = load_tile(q + b * q_batch + h * q_head, row, lane, q_row, 1, Lq, D)
    # asked for before the products: they need not be waited for
    rest = load_tile(own + b * own_batch + h * own_head, row, lane, own_row, 1, Lq, D)
    at = (b * H + h) * Lq + row
    known = tl.load(norm + at, mask=row < Lq, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = over_keys(
        tile,
        acc,
        top,
        total,
        row,
        Lq,
        prefix_k + kv * pk_head,
        prefix_v + kv * pv_head,
        pk_row,
        pv_row,
        P,
        P,
        D,
        scale,
        q,
        0,
        0,
        MASKED=False,
        CAUSAL=False,
        WORK=WORK,
        PRECISION=PRECISION,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )
    higher = tl.maximum(top, known)
    ours = tl.exp(top - higher)
    theirs = tl.exp(known - higher)
    whole = total * ours + theirs
    acc = acc * (ours / whole)[:, None] + rest.to(tl.float32) * (theirs / whole)[:, None]
    store_tile(y + b * y_batch + h * y_head, row, lane, y_row, 1, Lq, D, acc)
    tl.store(lse + at, higher + tl.log(whole), mask=row < Lq)


@triton.jit
def _prefix_grads_kernel(
    grad_y,
    q,
    prefix_k,
    prefix_v,
    y,
    lse,
    delta,
    own,
    grad_q,
    sums_k,
    sums_v,
    H,
    group,
    Lq,
    P,
    D,
    chunk,
    gy_batch,
    gy_head,
    gy_row,
    q_batch,
    q_head,
    q_row,
    pk_head,
    pk_row,
    pv_head,
    pv_row,
    y_batch,
    y_head,
    y_row,
    own_batch,
    own_head,
    own_row,
    gq_batch,
    gq_head,
    gq_row,
    scale,
    WANT_Q: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    WHOLE: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * chunk
    blocks = tl.cdiv(tl.minimum(begin + chunk, Lq) - begin, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    keys = prefix_k + kv * pk_head
    values = prefix_v + kv * pv_head
    if WHOLE:
        key = load_tile(keys, col, lane, pk_row, 1, P, D).to(WORK)
        value = load_tile(values, col, lane, pv_row, 1, P, D).to(WORK)
        sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, group * blocks):
        head = kv * group + step // blocks
        row = begin + (step % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        tile = load_tile(q + b * q_batch + head * q_head, row, lane, q_row, 1, Lq, D)
        grad = load_tile(grad_y + b * gy_batch + head * gy_head, row, lane, gy_row, 1, Lq, D)
        out = load_tile(y + b * y_batch + head * y_head, row, lane, y_row, 1, Lq, D)
        at = (b * H + head) * Lq + row
        norm = tl.load(lse + at, mask=row < Lq, other=float("inf"))
        slack = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        if WANT_Q:
            rest = load_tile(own + b * own_batch + head * own_head, row, lane, own_row, 1, Lq, D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WHOLE:
            left = tile.to(WORK)
            slope = grad.to(WORK)
            score = tl.dot(left, tl.trans(key), input_precision=PRECISION) * scale
            p = tl.where(col[None, :] < P, tl.exp(score - norm[:, None]), 0.0)
            if WANT_V:
                sum_v = tl.dot(tl.trans(p.to(WORK)), slope, sum_v, input_precision=PRECISION)
            if WANT_Q or WANT_K:
                grad_p = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
                grad_s = (p * (grad_p - slack[:, None])).to(WORK)
                if WANT_K:
                    sum_k = tl.dot(tl.trans(grad_s), left, sum_k, input_precision=PRECISION)
                if WANT_Q:
                    acc = tl.dot(grad_s, key, acc, input_precision=PRECISION)
        else:
            tl.store(delta + at, slack, mask=row < Lq)
            if WANT_Q:
                acc = query_over_keys(
                    acc,
                    tile,
                    grad,
                    norm,
                    slack,
                    row,
                    Lq,
                    keys,
                    values,
                    pk_row,
                    pv_row,
                    P,
                    P,
                    D,
                    scale,
                    q,
                    0,
                    0,
                    MASKED=False,
                    CAUSAL=False,
                    WORK=WORK,
                    PRECISION=PRECISION,
                    BLOCK_N=BLOCK_N,
                    BLOCK_D=BLOCK_D,
                )
        if WANT_Q:
            acc = acc * scale + rest.to(tl.float32)
            store_tile(grad_q + b * gq_batch + head * gq_head, row, lane, gq_row, 1, Lq, D, acc)
    if WHOLE:
        part = (b * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + kv
        if WANT_K:
            store_tile(sums_k + part * P * D, col, lane, D, 1, P, D, sum_k * scale)
        if WANT_V:
            store_tile(sums_v + part * P * D, col, lane, D, 1, P, D, sum_v)


@triton.jit
def _sum_pieces_kernel(
    sums_k,
    sums_v,
    grad_k,
    grad_v,
    parts,
    count,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """As reduce.py's, of two tensors; several partial sums are under way at a time."""
    sums = sums_k
    grad = grad_k
    if tl.program_id(1) + FIRST == 1:
        sums = sums_v
        grad = grad_v
    index = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    piece = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, parts, BLOCK_P):
        total += tl.sum(load_tile(sums, first + piece, index, count, 1, parts, count), 0)
    tl.store(grad + index, total.to(grad.dtype.element_ty), mask=index < count)


def merge_prefix(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own: Tensor,
    norm: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    scale: float,
    precision: Precision,
) -> None:
    """Write ``y`` and ``lse`` of all keys, from ``own`` and ``norm`` of those but the prefix.

    ``y`` may be ``own``, and ``lse`` be ``norm``. Both ``[B, H, Lq]`` are contiguous; D of every
    tensor lies side by side.
    """
    (b, h, l_q, d), (h_kv, keys, _) = q.shape, prefix_k.shape
    aligned = configs.is_aligned(q, prefix_k, prefix_v, own, y)
    config = attention_configs.merge_prefix(d, keys, precision.wide, aligned)
    _merge_prefix_kernel[(triton.cdiv(l_q, config.rows), b * h)](
        q,
        prefix_k,
        prefix_v,
        own,
        norm,
        y,
        lse,
        h,
        h // h_kv,
        l_q,
        keys,
        d,
        *q.stride()[:3],
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        *own.stride()[:3],
        *y.stride()[:3],
        scale,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_D=attention_configs.head_lanes(d),
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.all_registers(),
    )


def prefix_grads(
    grad_y: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    own: Tensor | None,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    *,
    scale: float,
    precision: Precision,
) -> None:
    """The prefix's part of a backward pass; ``y`` and ``lse`` are those of all keys.

    Args:
        own: the other keys' part of the gradient of q; None where none is wanted.
        grad_q: where the sum goes; may be ``own``.
        grad_k: gradient of ``prefix_k`` ``[Hkv, P, D]``, contiguous, or None; so ``grad_v``.
    """
    (b, h, l_q, d), (h_kv, keys, _) = q.shape, prefix_k.shape
    aligned = configs.is_aligned(grad_y, q, prefix_k, prefix_v, y)
    config, whole = attention_configs.prefix_grads(d, keys, precision.wide, aligned)
    pieces, chunk = triton.cdiv(l_q, config.rows), config.rows
    delta, sums = q, [q, q]
    if whole:
        pieces, chunk = configs.split(l_q, config.rows, h_kv * b)
        shape = (b * pieces, h_kv, keys, d)
        sums = [
            q if g is None else torch.empty(shape, dtype=torch.float32, device=q.device)
            for g in (grad_k, grad_v)
        ]
    else:
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    rest, target = (q, q) if own is None or grad_q is None else (own, grad_q)
    _prefix_grads_kernel[(pieces, h_kv, b)](
        grad_y,
        q,
        prefix_k,
        prefix_v,
        y,
        lse,
        delta,
        rest,
        target,
        *sums,
        h,
        h // h_kv,
        l_q,
        keys,
        d,
        chunk,
        *grad_y.stride()[:3],
        *q.stride()[:3],
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        *y.stride()[:3],
        *rest.stride()[:3],
        *target.stride()[:3],
        scale,
        WANT_Q=grad_q is not None,
        WANT_K=whole and grad_k is not None,
        WANT_V=whole and grad_v is not None,
        WHOLE=whole,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_D=attention_configs.head_lanes(d),
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.all_registers(),
    )
    if grad_k is None and grad_v is None:
        return
    if not whole:
        grad_prefix(
            grad_y, q, prefix_k, prefix_v, lse, delta, grad_k, grad_v,
            scale=scale, precision=precision,
        )  # fmt: skip
        return
    count, wanted = keys * h_kv * d, [g for g in (grad_k, grad_v) if g is not None]
    out = [q if g is None else g for g in (grad_k, grad_v)]
    grid = triton.cdiv(count, attention_configs.SUMMED), len(wanted)
    _sum_pieces_kernel[grid](
        *sums,
        *out,
        b * pieces,
        count,
        FIRST=int(grad_k is None),
        BLOCK_P=16,
        BLOCK_SIZE=attention_configs.SUMMED,
        **configs.all_registers(),
    )
