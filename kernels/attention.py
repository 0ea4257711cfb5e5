"""Attention with a prefix, forward     (Li and Liang 2021; computed as by Dao et al. 2022)

    Y = softmax(s · Q [Pk; K]ᵀ) [Pv; V],   lse = log Σ exp

    q, y [B,H,Lq,D]  k, v [B,Hkv,Lk,D]  prefix_k, prefix_v [Hkv,P,D]  mask [B,H,Lq,Lk]  lse [B,H,Lq]

A program keeps a tile of one head's queries and walks over the prefix and then over the keys, with
a running maximum and sum: the prefix has a batch stride of zero, so nothing is joined or expanded.
Every query sees the prefix; the mask and causality are of the rest. Traffic: q, y and lse once,
keys and values once for each tile of queries, of which all but the first come from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import attention_configs, configs
from .precision import Precision
from .tiles import load_tile, store_tile


@triton.jit
def seen(row, col, rows, keys, mask, m_row, m_col, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """[rows, cols] of int1: which query sees which key."""
    found = col[None, :] < keys
    if CAUSAL:
        found = found & (col[None, :] <= row[:, None])
    if MASKED:
        offset = row.to(tl.int64)[:, None] * m_row + col.to(tl.int64)[None, :] * m_col
        found = tl.load(mask + offset, mask=found & (row[:, None] < rows), other=0) != 0
    return found


@triton.jit
def over_keys(
    q,
    acc,
    top,
    total,
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
    """The online softmax of a tile of queries goes on over keys 0 … last - 1."""
    lane = tl.arange(0, BLOCK_D)
    left = q.to(WORK)
    for first in range(0, last, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        right = load_tile(k, col, lane, k_row, 1, keys, D).to(WORK)
        score = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
        found = seen(row, col, rows, keys, mask, m_row, m_col, MASKED, CAUSAL)
        score = tl.where(found, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # a row that has seen no key yet: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(score - base[:, None])
        decay = tl.exp(top - base)
        total = total * decay + tl.sum(p, 1)
        value = load_tile(v, col, lane, v_row, 1, keys, D).to(WORK)
        acc = tl.dot(p.to(WORK), value, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def _attention_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    mask,
    y,
    lse,
    H,
    group,
    Lq,
    Lk,
    P,
    D,
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
    scale,
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
    tile = load_tile(q + b * q_batch + h * q_head, row, lane, q_row, 1, Lq, D)
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
    last = tl.minimum(Lk, first + BLOCK_M) if CAUSAL else Lk
    acc, top, total = over_keys(
        tile,
        acc,
        top,
        total,
        row,
        Lq,
        k + b * k_batch + kv * k_head,
        v + b * v_batch + kv * v_head,
        k_row,
        v_row,
        Lk,
        last,
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
    # a query that sees nothing: y = 0, and lse = inf makes its p 0 in the backward pass
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    store_tile(y + b * y_batch + h * y_head, row, lane, y_row, 1, Lq, D, acc)
    out = tl.where(blind, float("inf"), top + tl.log(total))
    tl.store(lse + (b * H + h) * Lq + row, out, mask=row < Lq)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    own: Precision,
    prefix: Precision,
    capability: int,
) -> None:
    """Write ``y`` and ``lse`` (contiguous). D of every tensor lies side by side; mask is uint8.

    Args:
        own: precision of the products with k and v.
        prefix: of those with the prefix.
        capability: of the GPU, as in 90 for sm_90.
    """
    (b, h, l_q, d), h_kv, l_kv = q.shape, k.shape[1], k.shape[2]
    aligned = configs.is_aligned(q, k, v, prefix_k, prefix_v)
    config = attention_configs.attention(d, prefix.wide, aligned, mask is not None, capability)
    masks = (0, 0, 0, 0) if mask is None else mask.stride()
    _attention_kernel[(triton.cdiv(l_q, config.rows), b * h)](
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        q if mask is None else mask,
        y,
        lse,
        h,
        h // h_kv,
        l_q,
        l_kv,
        prefix_k.shape[1],
        d,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        *masks,
        *y.stride()[:3],
        scale,
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
