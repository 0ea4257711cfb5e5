"""dB and dA on the multiprocessors that a persistent dx leaves over     (Hopper and later)

    dB = dyᵀ S      dA = dSᵀ x         dy [M,N]  x [M,K]  S, dS [M,R] fp32  dB [N,R]  dA [R,K]

Both are sums over the rows of a tall matrix, which they read once, limited by memory; dx is limited
by its products. A persistent GEMM of 1024 tiles takes 8 rounds on 132 multiprocessors, and 8 on
128: four are free, and read dy and x meanwhile. A program stays on one of them and takes every P-th
block of columns, of P programs, first those of dB, with all of its rows: no partial sums, and how
many programs there are changes no bits. A program needs more than half of a multiprocessor's shared
memory, so that each has one of its own, whichever of the two kernels begins first.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .persistent import described
from .tiles import load_tile


@triton.jit
def _columns(
    tall,
    side,
    out,
    first,
    M,
    C,
    R,
    side_row,
    out_col,
    out_lane,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``out[c, r] = Σ_m tall[m, c] side[m, r]`` for a block of columns c of ``tall [M, C]``."""
    lane = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for m in range(0, M, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        tile = tall.load([m, first])
        right = load_tile(side, row, lane, side_row, 1, M, R).to(tile.dtype)
        acc = tl.dot(tile.T, right, acc)
    col = first + tl.arange(0, BLOCK_C)
    offset = col.to(tl.int64)[:, None] * out_col + lane.to(tl.int64)[None, :] * out_lane
    inside = (col[:, None] < C) & (lane[None, :] < R)
    tl.store(out + offset, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _beside_kernel(
    grad_y,
    x,
    s,
    grad_s,
    grad_b,
    grad_a,
    M,
    N,
    K,
    R,
    s_row,
    gs_row,
    gb_row,
    gb_col,
    ga_row,
    ga_col,
    WANT_B: tl.constexpr,
    WANT_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    of_b = 0
    of_a = 0
    if WANT_B:
        of_b = tl.cdiv(N, BLOCK_C)
    if WANT_A:
        of_a = tl.cdiv(K, BLOCK_C)
    for block in range(tl.program_id(0), of_b + of_a, tl.num_programs(0)):
        if block < of_b:
            if WANT_B:
                _columns(
                    grad_y, s, grad_b, block * BLOCK_C, M, N, R, s_row, gb_row, gb_col,
                    BLOCK_M, BLOCK_C, BLOCK_R,
                )  # fmt: skip
        else:
            if WANT_A:
                _columns(
                    x, grad_s, grad_a, (block - of_b) * BLOCK_C, M, K, R, gs_row, ga_col, ga_row,
                    BLOCK_M, BLOCK_C, BLOCK_R,
                )  # fmt: skip


def beside(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    grad_s: Tensor,
    grad_b: Tensor | None,
    grad_a: Tensor | None,
    *,
    programs: int,
) -> None:
    """Write those of grad_b ``[N, R]`` and grad_a ``[R, K]`` that are given. dy and x are such as
    ``persistent.is_describable`` takes; R is at most 128; s and grad_s fp32 ``[M, R]``."""
    (m, n), k, rank = grad_y.shape, x.shape[1], s.shape[1]
    config = configs.beside(rank)
    unused = s[:0]
    to_b = unused if grad_b is None else grad_b
    to_a = unused if grad_a is None else grad_a
    _beside_kernel[(programs,)](
        described(grad_y, config.rows, config.cols),
        described(x, config.rows, config.cols),
        s,
        grad_s,
        to_b,
        to_a,
        m,
        n,
        k,
        rank,
        s.stride(0),
        grad_s.stride(0),
        to_b.stride(0),
        to_b.stride(1),
        to_a.stride(0),
        to_a.stride(1),
        WANT_B=grad_b is not None,
        WANT_A=grad_a is not None,
        BLOCK_M=config.rows,
        BLOCK_C=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
