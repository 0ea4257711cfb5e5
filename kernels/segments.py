"""The rank parts of the two GEMMs, as pieces of a kernel's body

    y:   acc + Σᵢ S_i B_iᵀ                 after the frozen product, in its accumulator
    dx:  Σᵢ mask_i ⊙ (dS_i A_i)            before it: what the frozen product starts from

    S, dS [M,ΣR] fp32, branches side by side  B_i [N,R_i]  A_i [R_i,K]; tuples: an entry a branch

Blocks of lanes are loops: unrolled, their operands would spill. So are names here that the frozen
loops do not use: those would carry them, with other types.
"""

import triton
import triton.language as tl

from .dropout import keep_mask
from .tiles import load_tile


@triton.jit
def add_ups(
    acc,
    s,
    b,
    row,
    col,
    M,
    N,
    s_row,
    b_row,
    b_col,
    RANKS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile [row, col] of y with the rank part."""
    offset = 0
    for i in tl.static_range(len(RANKS)):
        for r in range(0, RANKS[i], BLOCK_R):
            lane = r + tl.arange(0, BLOCK_R)
            side = load_tile(s + offset, row, lane, s_row, 1, M, RANKS[i])
            up = load_tile(b[i], col, lane, b_row[i], b_col[i], N, RANKS[i])
            acc = tl.dot(side.to(WORK), tl.trans(up.to(WORK)), acc, input_precision=PRECISION)
        offset += RANKS[i]
    return acc


@triton.jit
def masked_downs(
    grad_s,
    a,
    seed,
    row,
    first_col,
    M,
    K,
    gs_row,
    a_row,
    a_col,
    stream,
    threshold,
    scale,
    RANKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The rank part of the tile of dx with the rows ``row`` and the columns from ``first_col``. A
    branch with a mask needs an accumulator of its own, which is gone before the frozen product."""
    col = first_col.to(tl.int64) + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    offset = 0
    for i in tl.static_range(len(RANKS)):
        if DROPOUT[i]:
            term = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for r in range(0, RANKS[i], BLOCK_R):
                lane = r + tl.arange(0, BLOCK_R)
                side = load_tile(grad_s + offset, row, lane, gs_row, 1, M, RANKS[i])
                down = load_tile(a[i], lane, col, a_row[i], a_col[i], RANKS[i], K)
                term = tl.dot(side.to(WORK), down.to(WORK), term, input_precision=PRECISION)
            key = tl.load(seed[i])
            keep = keep_mask(key, row, first_col, stream[i], threshold[i], BLOCK_M, BLOCK_K)
            acc += tl.where(keep, term * scale[i], 0.0)
        else:
            for r in range(0, RANKS[i], BLOCK_R):
                lane = r + tl.arange(0, BLOCK_R)
                side = load_tile(grad_s + offset, row, lane, gs_row, 1, M, RANKS[i])
                down = load_tile(a[i], lane, col, a_row[i], a_col[i], RANKS[i], K)
                acc = tl.dot(side.to(WORK), down.to(WORK), acc, input_precision=PRECISION)
        offset += RANKS[i]
    return acc
