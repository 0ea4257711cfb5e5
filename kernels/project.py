"""Down-projection     S = s · drop(x) Aᵀ     (LoRA: Hu et al. 2021, eq. 3)

    x [M,K]  A [R,K]  S [M,R] fp32; s folds in the keep scale 1/(1-p), once, in fp32.

One program reads a tile row of x and all of A's rows that it has lanes for, accumulates in fp32
and, where M alone gives too few programs, takes only a piece of K and leaves a partial sum.
Traffic: x once for each 128 ranks, 4·M·R bytes written (twice and a read when K is cut); A from L2.
The same kernel makes dS = s · dy B, with Bᵀ given by strides, where that goes apart from dB.
Where a batch mixes adapters S is 0 in the rows of the others, so all that is made of it follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, keep_mask, keep_scale
from .precision import Precision
from .reduce import partials_or, sum_partials
from .tiles import is_own, load_tile, store_tile


@triton.jit(do_not_specialize=["stream", "threshold", "number"])
def _project_kernel(
    x,
    a,
    s,
    seed,
    M,
    K,
    R,
    chunk,
    x_row,
    x_col,
    a_row,
    a_col,
    s_part,
    s_row,
    scale,
    stream,
    threshold,
    adapter,
    number,
    DROPOUT: tl.constexpr,
    ROUTED: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    first = part * chunk
    if DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(first, tl.minimum(first + chunk, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        tile = load_tile(x, row, col, x_row, x_col, M, K)
        if DROPOUT:
            keep = keep_mask(key, row, k, stream, threshold, BLOCK_M, BLOCK_K)
            tile = tl.where(keep, tile, 0.0)
        down = load_tile(a, lane, col, a_row, a_col, R, K)
        acc = tl.dot(tile.to(WORK), tl.trans(down.to(WORK)), acc, input_precision=PRECISION)
    acc = acc * scale
    if ROUTED:
        acc = tl.where(is_own(adapter, row, M, number)[:, None], acc, 0.0)
    store_tile(s + part.to(tl.int64) * s_part, row, lane, s_row, 1, M, R, acc)


def project(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    *,
    scaling: float,
    precision: Precision,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    adapter: Tensor | None = None,
    number: int = 0,
) -> None:
    """Write ``s [M, R]`` (fp32, rows may be strided) for x ``[M, K]`` and a ``[R, K]``; with
    ``adapter`` (int32 ``[M]``) zeros in the rows where it is not ``number``."""
    (m, k), rank = x.shape, a.shape[0]
    across = a.stride(0) == 1 and rank > 1
    threshold = drop_threshold(dropout)
    config = configs.project(
        m, rank, precision.wide, configs.is_aligned(x, a), across, threshold > 0
    )
    grid_m, grid_r = triton.cdiv(m, config.rows), triton.cdiv(rank, config.rank)
    parts, chunk = configs.split(k, config.cols, grid_m * grid_r)
    target = partials_or(s, parts)
    _project_kernel[(grid_m, grid_r, parts)](
        x,
        a,
        target,
        seed,
        m,
        k,
        rank,
        chunk,
        x.stride(0),
        x.stride(1),
        a.stride(0),
        a.stride(1),
        target.stride(0),
        target.stride(1),
        scaling * keep_scale(threshold),
        stream,
        threshold,
        adapter,
        number,
        DROPOUT=threshold > 0,
        ROUTED=adapter is not None,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts > 1:
        sum_partials(target, s)


def project_branches(
    x: Tensor,
    a: list[Tensor],
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    precision: Precision,
    adapter: Tensor | None = None,
) -> Tensor:
    """``S [M, ΣR]`` of all branches side by side; one launch a branch, branch i on stream i. With
    ``adapter``, each row's own branch and zeros beside it."""
    s = torch.empty((x.shape[0], sum(t.shape[0] for t in a)), dtype=torch.float32, device=x.device)
    column = 0
    for i, down in enumerate(a):
        project(
            x,
            down,
            s[:, column : column + down.shape[0]],
            scaling=scaling[i],
            precision=precision,
            dropout=dropout[i],
            seed=seed,
            stream=i,
            adapter=adapter,
            number=i,
        )
        column += down.shape[0]
    return s
