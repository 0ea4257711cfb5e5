"""Decoding: y and S of few rows     S = s · x Aᵀ,   y = x Wᵀ + S Bᵀ + bias     (LoRA: Hu et al.
2021, eq. 3)

    x [M,K], M ≤ 16  W [N,K]  A [R,K], R ≤ 64  B [N,R]  bias [N]  y [M,N]  S [M,R] fp32

W's bytes are the limit: on an H200 14 µs of [4096,4096], 33 of [14336,4096]. S comes one of two
ways:

    within   each program makes all of S beside its tile of y, on the same walk over K: one launch,
             and A from L2 once for each tile of columns
    beside   a few programs make PARTS sums over pieces of K, while those of y walk over W already
             (programmatic dependent launch, sm_90 and later; elsewhere they follow, which takes
             1.5 to 5 µs more on an H200); each adds the sums up when its walk is over, in order

Either way each element has one order of summation, and the first program writes S. Beyond the
frozen layer: A, B and S; beside, 4·PARTS·M·R bytes written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import configs
from .precision import Precision
from .tiles import add_product, load_tile, store_tile

ROWS, RANKS = configs.DECODED


@triton.jit
def _decode_parts_kernel(
    x,
    a,
    parts,
    M,
    K,
    R,
    chunk,
    x_row,
    x_col,
    a_row,
    a_col,
    scale,
    OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if OVERLAPS:
        gdc_launch_dependents()
    row = tl.arange(0, BLOCK_M)
    lane = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    first = part * chunk
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(first, tl.minimum(first + chunk, K), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        left = load_tile(x, row, inner, x_row, x_col, M, K)
        down = load_tile(a, lane, inner, a_row, a_col, R, K)
        acc = add_product(acc, left, tl.trans(down))
    store_tile(parts + part * M * R, row, lane, R, 1, M, R, acc * scale)


@triton.jit
def _sum_of_parts(parts, row, lane, M, R, PARTS: tl.constexpr):
    """The tile [row, lane] of S. All loads at once: one after the other would take as long as the
    rest of a program's end."""
    part = tl.arange(0, PARTS)[:, None, None]
    row = row[None, :, None]
    lane = lane[None, None, :]
    inside = (row < M) & (lane < R)
    return tl.sum(tl.load(parts + (part * M + row) * R + lane, mask=inside, other=0.0), 0)


@triton.jit
def _decode_kernel(
    x,
    weight,
    bias,
    a,
    b,
    parts,
    s,
    y,
    M,
    N,
    K,
    R,
    x_row,
    x_col,
    w_row,
    w_col,
    a_row,
    a_col,
    b_row,
    b_col,
    scale,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    col = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_R)
    # before the walk, so that nothing waits for memory after it
    up = load_tile(b, col, lane, b_row, b_col, N, R)
    if HAS_BIAS:
        offset = tl.load(bias + col, mask=col < N, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    side = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        left = load_tile(x, row, inner, x_row, x_col, M, K)
        right = load_tile(weight, col, inner, w_row, w_col, N, K)
        acc = add_product(acc, left, tl.trans(right))
        if PARTS == 0:
            down = load_tile(a, lane, inner, a_row, a_col, R, K)
            side = add_product(side, left, tl.trans(down))
    if PARTS == 0:
        side = side * scale
    else:
        if OVERLAPS:  # what the launch before this one wrote is there from here on
            gdc_wait()
        side = _sum_of_parts(parts, row, lane, M, R, PARTS)
    if tile == 0:
        store_tile(s, row, lane, R, 1, M, R, side)
    acc = tl.dot(side.to(WORK), tl.trans(up.to(WORK)), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += offset.to(tl.float32)[None, :]
    store_tile(y, row, col, N, 1, M, N, acc)


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    scaling: float,
    precision: Precision,
    capability: int,
) -> None:
    """Write ``s [M, R] = scaling · x Aᵀ`` and ``y [M, N] = x Wᵀ + s Bᵀ + bias``, both contiguous;
    a and b in the dtype of x."""
    (m, k), (n, rank) = x.shape, b.shape
    plain = configs.is_plain(x, weight, [rank]) and configs.is_aligned(a)
    across = weight.stride(1) != 1
    config = configs.decode(n, k, rank, x.dtype, capability, plain, across)
    overlaps = config.parts > 0 and configs.overlaps(capability)
    parts = s
    if config.parts:
        parts = torch.empty((config.parts, m, rank), dtype=torch.float32, device=x.device)
        tiles = configs.decode_parts(x.dtype, plain)
        _decode_parts_kernel[(triton.cdiv(rank, tiles.rank), config.parts)](
            x,
            a,
            parts,
            m,
            k,
            rank,
            triton.cdiv(k, config.parts * tiles.cols) * tiles.cols,
            x.stride(0),
            x.stride(1),
            a.stride(0),
            a.stride(1),
            scaling,
            OVERLAPS=overlaps,
            BLOCK_M=ROWS,
            BLOCK_K=tiles.cols,
            BLOCK_R=tiles.rank,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    _decode_kernel[(triton.cdiv(n, config.cols),)](
        x,
        weight,
        bias,
        a,
        b,
        parts,
        s,
        y,
        m,
        n,
        k,
        rank,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        scaling,
        PARTS=config.parts,
        OVERLAPS=overlaps,
        HAS_BIAS=bias is not None,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=ROWS,
        BLOCK_N=config.cols,
        BLOCK_K=config.inner,
        BLOCK_R=configs.rank_lanes(rank, False, RANKS),
        num_warps=config.warps,
        num_stages=config.stages,
        **({"launch_pdl": True} if overlaps else {}),
    )
