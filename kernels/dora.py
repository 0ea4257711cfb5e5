"""Lengths of the rows of an adapted weight     (DoRA: Liu et al. 2024, eq. 5)

    ‖w + s b A‖² = (‖w‖² + 2 s ⟨w Aᵀ, b⟩) + s² b (A Aᵀ) bᵀ        w, b: a row of W, of B

    W [N,K]  A [R,K]  B [N,R]  norms [N] fp32; A Aᵀ [R,R] comes from project.py

The first two terms are sums over K: a program reads a tile of W once for both, and leaves one
number a row for its piece of K, since ⟨·, b⟩ of a sum is a sum. The pieces are then added in a
fixed order, and the last term with them. W Aᵀ never leaves registers, and ‖w‖² costs no pass of its
own, so there is nothing to cache.
Traffic: W once for each 128 ranks, A once for each 32 rows (from L2), 8·N·pieces bytes of partials.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .precision import Precision
from .project import project
from .tiles import load_tile


@triton.jit
def _row_norms_kernel(
    weight,
    a,
    b,
    sums,
    N,
    K,
    R,
    chunk,
    w_row,
    w_col,
    a_row,
    a_col,
    b_row,
    b_col,
    scale,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(2) * chunk
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    own = tl.zeros([BLOCK_N], tl.float32)
    for k in range(first, tl.minimum(first + chunk, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        tile = load_tile(weight, row, col, w_row, w_col, N, K)
        down = load_tile(a, lane, col, a_row, a_col, R, K)
        acc = tl.dot(tile, tl.trans(down.to(WORK)), acc, input_precision=PRECISION)
        wide = tile.to(tl.float32)
        own += tl.sum(wide * wide, 1)
    up = load_tile(b, row, lane, b_row, b_col, N, R).to(tl.float32)
    total = tl.sum(acc * up, 1) * scale
    if tl.program_id(1) == 0:
        total += own
    place = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place.to(tl.int64) * N + row, total, mask=row < N)


@triton.jit
def _row_norms_finish_kernel(
    sums,
    b,
    gram,
    norms,
    N,
    R,
    parts,
    b_row,
    b_col,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    source = sums + row
    for _ in range(0, parts):
        total += tl.load(source, mask=row < N, other=0.0)
        source += N  # a pointer moves in 64 bits; part * N might not
    added = tl.zeros([BLOCK_N], tl.float32)
    for r in range(0, R, BLOCK_R):
        lane = r + tl.arange(0, BLOCK_R)
        across = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for q in range(0, R, BLOCK_R):
            inner = q + tl.arange(0, BLOCK_R)
            left = load_tile(b, row, inner, b_row, b_col, N, R).to(tl.float32)
            right = load_tile(gram, inner, lane, R, 1, R, R)
            across = tl.dot(left, right, across, input_precision=PRECISION)
        up = load_tile(b, row, lane, b_row, b_col, N, R).to(tl.float32)
        added += tl.sum(across * up, 1)
    total += added * scale
    # where, not a maximum: NaN stays NaN
    tl.store(norms + row, tl.sqrt_rn(tl.where(total < 0.0, 0.0, total)), mask=row < N)


def row_norms(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    norms: Tensor,
    *,
    scaling: float,
    precision: Precision,
    exact: Precision,
    capability: int,
) -> None:
    """Write ``norms [N]`` (fp32, side by side).

    ``precision``: of the product of W and A, in the dtype of W; ``exact``: of what is added.
    """
    (n, k), rank = weight.shape, a.shape[0]
    gram = torch.empty((rank, rank), dtype=torch.float32, device=a.device)
    project(a, a, gram, scaling=1.0, precision=exact)
    aligned = configs.is_aligned(weight, a)
    config = configs.row_norms(rank, precision.wide, aligned, capability)
    grid_n, grid_r = triton.cdiv(n, config.rows), triton.cdiv(rank, config.rank)
    pieces, chunk = configs.split(k, config.cols, grid_n * grid_r)
    sums = torch.empty((pieces * grid_r, n), dtype=torch.float32, device=a.device)
    _row_norms_kernel[(grid_n, grid_r, pieces)](
        weight,
        a,
        b,
        sums,
        n,
        k,
        rank,
        chunk,
        *weight.stride(),
        *a.stride(),
        *b.stride(),
        2.0 * scaling,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_N=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    finish = configs.row_norms_finish()
    _row_norms_finish_kernel[(triton.cdiv(n, finish.rows),)](
        sums,
        b,
        gram,
        norms,
        n,
        rank,
        len(sums),
        *b.stride(),
        scaling * scaling,
        PRECISION=exact.dot,
        BLOCK_N=finish.rows,
        BLOCK_R=finish.rank,
        num_warps=finish.warps,
        num_stages=finish.stages,
    )
