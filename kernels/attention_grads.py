"""Attention with a prefix, backward     (Dao et al. 2022, algorithm 4, without atomics)

    P = exp(S - lse),   δ = Σ dY ∘ Y,   dS = P ∘ (dY Vᵀ - δ)
    dV = Pᵀ dY,   dQ = s · dS K,   dK = s · dSᵀ Q,   dPk, dPv: the same, summed over the batch

    q, y, dy [B,H,Lq,D]  k, v [B,Hkv,Lk,D]  prefix_k, prefix_v [Hkv,P,D]  lse, δ [B,H,Lq] fp32

One kernel walks over the keys for a tile of queries (dQ, and δ for the other), one over all queries
that read a tile of keys. The prefix is such keys too, once more with a batch stride of zero, and
its few tiles are cut into pieces of the queries, whose partial sums are added in a fixed order.
Traffic: q, dy once for each tile of keys, k, v once for each tile of queries, mostly from L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_configs, configs
from .attention import seen
from .precision import Precision
from .reduce import sum_partials
from .tiles import load_tile, store_tile


@triton.jit
def query_over_keys(
    acc,
    q,
    grad,
    norm,
    delta,
    row,
    rows,
    k,
    v,
    k_row,
    v_row,
    keys,
    last,
    D,
    scale,
    mask,
    m_row,
    m_col,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """acc += dS K over keys 0 … last - 1."""
    lane = tl.arange(0, BLOCK_D)
    left, slope = q.to(WORK), grad.to(WORK)
    for first in range(0, last, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        right = load_tile(k, col, lane, k_row, 1, keys, D).to(WORK)
        value = load_tile(v, col, lane, v_row, 1, keys, D).to(WORK)
        score = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
        found = seen(row, col, rows, keys, mask, m_row, m_col, MASKED, CAUSAL)
        p = tl.where(found, tl.exp(score - norm[:, None]), 0.0)
        grad_p = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_s.to(WORK), right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _grad_query_kernel(
    grad_y,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    mask,
    y,
    lse,
    delta,
    grad_q,
    H,
    group,
    Lq,
    Lk,
    P,
    D,
    gy_batch,
    gy_head,
    gy_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    pk_head,
    pk_row,
    pv_head,
    pv_row,
    m_batch,
    m_head,
    m_row,
    m_col,
    y_batch,
    y_head,
    y_row,
    gq_batch,
    gq_head,
    gq_row,
    scale,
    WANTED: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WORK: tl.constexpr,
    PREFIX_WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFIX_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    kv = h // group
    row = first + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    grad = load_tile(grad_y + b * gy_batch + h * gy_head, row, lane, gy_row, 1, Lq, D)
    out = load_tile(y + b * y_batch + h * y_head, row, lane, y_row, 1, Lq, D)
    slack = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at = (b * H + h) * Lq + row
    tl.store(delta + at, slack, mask=row < Lq)
    if WANTED:
        norm = tl.load(lse + at, mask=row < Lq, other=float("inf"))
        tile = load_tile(q + b * q_batch + h * q_head, row, lane, q_row, 1, Lq, D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc = query_over_keys(
            acc,
            tile,
            grad,
            norm,
            slack,
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
            mask,
            0,
            0,
            MASKED=False,
            CAUSAL=False,
            WORK=PREFIX_WORK,
            PRECISION=PREFIX_PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
        )
        acc = query_over_keys(
            acc,
            tile,
            grad,
            norm,
            slack,
            row,
            Lq,
            k + b * k_batch + kv * k_head,
            v + b * v_batch + kv * v_head,
            k_row,
            v_row,
            Lk,
            tl.minimum(Lk, first + BLOCK_M) if CAUSAL else Lk,
            D,
            scale,
            mask + b * m_batch + h * m_head,
            m_row,
            m_col,
            MASKED=MASKED,
            CAUSAL=CAUSAL,
            WORK=WORK,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
        )
        store_tile(grad_q + b * gq_batch + h * gq_head, row, lane, gq_row, 1, Lq, D, acc * scale)


@triton.jit
def _grad_key_kernel(
    grad_y,
    q,
    k,
    v,
    mask,
    lse,
    delta,
    grad_k,
    grad_v,
    H,
    group,
    Lq,
    keys,
    D,
    chunk,
    pieces,
    gy_batch,
    gy_head,
    gy_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    m_batch,
    m_head,
    m_row,
    m_col,
    gk_part,
    gk_head,
    gk_row,
    gv_part,
    gv_head,
    gv_row,
    scale,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    b = part // pieces
    begin = (part % pieces).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, Lq)
    first_key = tl.program_id(0) * BLOCK_N
    if CAUSAL:  # earlier queries see none of these keys
        begin = tl.maximum(begin, first_key // BLOCK_M * BLOCK_M)
    col = first_key + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    key = load_tile(k + b * k_batch + kv * k_head, col, lane, k_row, 1, keys, D).to(WORK)
    value = load_tile(v + b * v_batch + kv * v_head, col, lane, v_row, 1, keys, D).to(WORK)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for one in range(0, group):
        head = kv * group + one
        for m in range(begin, end, BLOCK_M):
            row = m + tl.arange(0, BLOCK_M)
            tile = load_tile(q + b * q_batch + head * q_head, row, lane, q_row, 1, Lq, D).to(WORK)
            grad = load_tile(grad_y + b * gy_batch + head * gy_head, row, lane, gy_row, 1, Lq, D)
            grad = grad.to(WORK)
            at = (b * H + head) * Lq + row
            norm = tl.load(lse + at, mask=row < Lq, other=float("inf"))
            score = tl.dot(tile, tl.trans(key), input_precision=PRECISION) * scale
            rows_mask = mask + b * m_batch + head * m_head
            found = seen(row, col, Lq, keys, rows_mask, m_row, m_col, MASKED, CAUSAL)
            p = tl.where(found, tl.exp(score - norm[:, None]), 0.0)
            if WANT_V:
                sum_v = tl.dot(tl.trans(p.to(WORK)), grad, sum_v, input_precision=PRECISION)
            if WANT_K:
                slack = tl.load(delta + at, mask=row < Lq, other=0.0)
                grad_p = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                grad_s = (p * (grad_p - slack[:, None])).to(WORK)
                sum_k = tl.dot(tl.trans(grad_s), tile, sum_k, input_precision=PRECISION)
    if WANT_K:
        store_tile(
            grad_k + part * gk_part + kv * gk_head, col, lane, gk_row, 1, keys, D, sum_k * scale
        )
    if WANT_V:
        store_tile(grad_v + part * gv_part + kv * gv_head, col, lane, gv_row, 1, keys, D, sum_v)


def grad_query(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor | None,
    *,
    scale: float,
    causal: bool,
    own: Precision,
    prefix: Precision,
    capability: int,
) -> None:
    """Write ``delta [B, H, Lq]`` (fp32, contiguous) and, where given, ``grad_q``; see attention."""
    (b, h, l_q, d), h_kv, l_kv = q.shape, k.shape[1], k.shape[2]
    aligned = configs.is_aligned(grad_y, q, k, v, prefix_k, prefix_v, y)
    config = attention_configs.grad_query(d, prefix.wide, aligned, mask is not None, capability)
    target = q if grad_q is None else grad_q
    masks = (0, 0, 0, 0) if mask is None else mask.stride()
    _grad_query_kernel[(triton.cdiv(l_q, config.rows), b * h)](
        grad_y,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        q if mask is None else mask,
        y,
        lse,
        delta,
        target,
        h,
        h // h_kv,
        l_q,
        l_kv,
        prefix_k.shape[1],
        d,
        *grad_y.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        *masks,
        *y.stride()[:3],
        *target.stride()[:3],
        scale,
        WANTED=grad_q is not None,
        MASKED=mask is not None,
        CAUSAL=causal,
        WORK=own.work,
        PREFIX_WORK=prefix.work,
        PRECISION=own.dot,
        PREFIX_PRECISION=prefix.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_D=attention_configs.head_lanes(d),
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.all_registers(),
    )


def grad_keys(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    *,
    scale: float,
    causal: bool,
    precision: Precision,
    capability: int,
) -> None:
    """Write those of ``grad_k`` and ``grad_v`` ``[B, Hkv, Lk, D]`` that are given."""
    wanted = next(g for g in (grad_k, grad_v) if g is not None)
    config = attention_configs.grad_keys(q.shape[3], precision.wide, mask is not None, capability)
    _launch(
        (grad_y, q, k, v), mask, lse, delta, grad_k, grad_v, wanted.shape[2], 1,
        scale, causal, precision, config,
    )  # fmt: skip


def grad_prefix(
    grad_y: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    *,
    scale: float,
    precision: Precision,
) -> None:
    """Write those of ``grad_k`` and ``grad_v`` ``[Hkv, P, D]`` (contiguous) that are given."""
    b = q.shape[0]
    h_kv, keys, d = prefix_k.shape
    config = attention_configs.grad_keys(d, precision.wide)
    programs = triton.cdiv(keys, config.cols) * h_kv * b
    pieces, _ = configs.split(q.shape[2], config.rows, programs)
    parts = b * pieces
    shape = (parts, h_kv, keys, d)
    to_k, to_v = (
        None if g is None else torch.empty(shape, dtype=torch.float32, device=q.device)
        for g in (grad_k, grad_v)
    )
    whole = [t.unsqueeze(0).expand(b, -1, -1, -1) for t in (prefix_k, prefix_v)]
    _launch(
        (grad_y, q, *whole), None, lse, delta, to_k, to_v, keys, pieces,
        scale, False, precision, config,
    )  # fmt: skip
    for part, grad in ((to_k, grad_k), (to_v, grad_v)):
        if part is not None and grad is not None:
            sum_partials(part.view(parts, h_kv * keys, d), grad.view(h_kv * keys, d))


def _launch(
    tensors: tuple[Tensor, ...],
    mask: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    keys: int,
    pieces: int,
    scale: float,
    causal: bool,
    precision: Precision,
    config: configs.Attend,
) -> None:
    grad_y, q, k, v = tensors
    (b, h, l_q, d), h_kv = q.shape, k.shape[1]
    chunk = triton.cdiv(triton.cdiv(l_q, config.rows), pieces) * config.rows
    to_k, to_v = (q if g is None else g for g in (grad_k, grad_v))
    masks = (0, 0, 0, 0) if mask is None else mask.stride()
    _grad_key_kernel[(triton.cdiv(keys, config.cols), h_kv, b * pieces)](
        grad_y,
        q,
        k,
        v,
        q if mask is None else mask,
        lse,
        delta,
        to_k,
        to_v,
        h,
        h // h_kv,
        l_q,
        keys,
        d,
        chunk,
        pieces,
        *grad_y.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *masks,
        *to_k.stride()[:3],
        *to_v.stride()[:3],
        scale,
        WANT_K=grad_k is not None,
        WANT_V=grad_v is not None,
        MASKED=mask is not None,
        CAUSAL=causal,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_D=attention_configs.head_lanes(d),
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.all_registers(),
    )
