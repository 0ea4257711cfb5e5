"""Gradient of the down-projection     dA = dSᵀ drop(x)

    dS [M,R] fp32 (with s)  x [M,K]  dA [R,K]; the mask of x is made again from the seed.

A program owns some columns of x and a piece of the rows, and keeps [R, columns] of dA in registers;
the pieces' partial sums are added in a fixed order (reduce.py).
Traffic: x once for each 128 ranks, dS once for each tile of columns (from L2), 8·R·K·pieces bytes
of partials.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, keep_mask, keep_scale
from .precision import Precision
from .reduce import partials_or, sum_partials
from .tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["stream", "threshold"])
def _grad_down_kernel(
    grad_s,
    x,
    grad_a,
    seed,
    M,
    K,
    R,
    chunk,
    gs_row,
    x_row,
    x_col,
    ga_part,
    ga_row,
    scale,
    stream,
    threshold,
    DROPOUT: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_col = tl.program_id(0) * BLOCK_K
    col = first_col + tl.arange(0, BLOCK_K)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    if DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    first = part * chunk
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        tile = load_tile(x, row, col, x_row, x_col, M, K)
        if DROPOUT:
            keep = keep_mask(key, row, first_col, stream, threshold, BLOCK_M, BLOCK_K)
            tile = tl.where(keep, tile, 0.0)
        side = load_tile(grad_s, row, lane, gs_row, 1, M, R).to(WORK)
        acc = tl.dot(tl.trans(side), tile.to(WORK), acc, input_precision=PRECISION)
    store_tile(grad_a + part * ga_part, lane, col, ga_row, 1, R, K, acc * scale)


def grad_down(
    grad_s: Tensor,
    x: Tensor,
    grad_a: Tensor,
    *,
    precision: Precision,
    dropout: float,
    seed: Tensor | None,
    stream: int,
) -> None:
    """Write ``grad_a [R, K]`` (contiguous) for grad_s ``[M, R]`` and x ``[M, K]``."""
    (m, k), rank = x.shape, grad_a.shape[0]
    threshold = drop_threshold(dropout)
    config = configs.grad_down(rank, precision.wide, threshold > 0)
    grid_k, grid_r = triton.cdiv(k, config.cols), triton.cdiv(rank, config.rank)
    parts, chunk = configs.split(m, config.rows, grid_k * grid_r, configs.OF_GRAD_DOWN)
    target = partials_or(grad_a, parts)
    _grad_down_kernel[(grid_k, grid_r, parts)](
        grad_s,
        x,
        target,
        seed,
        m,
        k,
        rank,
        chunk,
        grad_s.stride(0),
        x.stride(0),
        x.stride(1),
        target.stride(0),
        target.stride(1),
        keep_scale(threshold),
        stream,
        threshold,
        DROPOUT=threshold > 0,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts > 1:
        sum_partials(target, grad_a)
