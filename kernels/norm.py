"""LayerNorm or RMSNorm, forward and backward     (Ba et al. 2016; Zhang and Sennrich 2019)

    n = (x − mean) · rstd,    y = n · gamma + bias          RMSNorm: mean = 0; "none": n = x
    g = dy · gamma,    dx = rstd · (g − E g − n · E(g n)),    dgamma = Σ_m dy · n,    dbias = Σ_m dy

    x, y, dx, dy [M,K]  gamma, bias [K]  stats [M,2] fp32 (mean, rstd)

Up to 8192 columns a program has whole rows in registers: traffic is x and y forward, x, dy and dx
backward, and partial sums of dgamma and dbias, 8·K bytes a piece, added in a fixed order. Longer
rows are read twice, the second time mostly from L2, and their dgamma and dbias have a pass of
their own. Without a norm nothing looks at a row as a whole, and tiles are as with one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .moments import inverse_root, join_moments, load_statistics, store_statistics, tile_moments
from .reduce import partials_or, sum_partials
from .tiles import load_tile, store_tile


@triton.jit
def _affine(n, gamma, bias, col, K, HAS_GAMMA: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_GAMMA:
        n *= tl.load(gamma + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        n += tl.load(bias + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
    return n


@triton.jit
def _norm_kernel(
    x,
    gamma,
    bias,
    y,
    stats,
    M,
    K,
    x_row,
    x_col,
    y_row,
    eps,
    NORM: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    if NORM == "none":
        for k in range(0, K, BLOCK_K):
            col = k + lane
            plain = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
            gained = _affine(plain, gamma, bias, col, K, HAS_GAMMA, HAS_BIAS)
            store_tile(y, row, col, y_row, 1, M, K, gained)
        return
    if WHOLE:
        tile = load_tile(x, row, lane, x_row, x_col, M, K).to(tl.float32)
        mean, m2 = tile_moments(tile, lane, K, K * 1.0, NORM == "layer")
        rstd = inverse_root(m2, K, eps)
        n = (tile - mean[:, None]) * rstd[:, None]
        out = _affine(n, gamma, bias, lane, K, HAS_GAMMA, HAS_BIAS)
        store_tile(y, row, lane, y_row, 1, M, K, out)
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        m2 = tl.zeros([BLOCK_M], tl.float32)
        for k in range(0, K, BLOCK_K):
            col = k + lane
            part = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
            count = tl.minimum(K - k, BLOCK_K) * 1.0
            more_mean, more_m2 = tile_moments(part, col, K, count, NORM == "layer")
            mean, m2 = join_moments(k * 1.0, mean, m2, count, more_mean, more_m2, NORM == "layer")
        rstd = inverse_root(m2, K, eps)
        for k in range(0, K, BLOCK_K):
            col = k + lane
            again = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
            scaled = (again - mean[:, None]) * rstd[:, None]
            value = _affine(scaled, gamma, bias, col, K, HAS_GAMMA, HAS_BIAS)
            store_tile(y, row, col, y_row, 1, M, K, value)
    store_statistics(stats, row, M, mean, rstd)


def norm(
    x: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor,
    *,
    eps: float,
    norm: str,
    capability: int,
) -> None:
    """Write ``y [M, K]`` and, with a norm, ``stats [M, 2]``; all but x lie side by side."""
    m, k = x.shape
    config = configs.norm(k)
    _norm_kernel[(triton.cdiv(m, config.rows),)](
        x,
        gamma,
        bias,
        y,
        stats,
        m,
        k,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        eps,
        NORM=norm,
        HAS_GAMMA=gamma is not None,
        HAS_BIAS=bias is not None,
        WHOLE=k <= config.cols,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        num_warps=config.warps,
        **configs.registers(capability),
    )


@triton.jit
def _norm_grad_kernel(
    grad_y,
    x,
    stats,
    gamma,
    grad_x,
    grad_gamma,
    grad_bias,
    M,
    K,
    chunk,
    gy_row,
    gy_col,
    x_row,
    x_col,
    gx_row,
    gg_part,
    gb_part,
    NORM: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_GAMMA: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    of_gamma = tl.zeros([BLOCK_K], tl.float32)
    of_bias = tl.zeros([BLOCK_K], tl.float32)
    factor = tl.full([BLOCK_K], 1.0, tl.float32)
    if WANT_X and HAS_GAMMA:
        factor = tl.load(gamma + col, mask=col < K, other=0.0).to(tl.float32)
    first = part * chunk
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        grad = load_tile(grad_y, row, col, gy_row, gy_col, M, K).to(tl.float32)
        if WANT_BIAS:
            of_bias += tl.sum(grad, 0)
        if NORM == "none":
            if WANT_GAMMA:
                n = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
                of_gamma += tl.sum(grad * n, 0)
            if WANT_X:
                store_tile(grad_x, row, col, gx_row, 1, M, K, grad * factor[None, :])
        elif WANT_X or WANT_GAMMA:
            mean, rstd = load_statistics(stats, row, M)
            n = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
            n = (n - mean[:, None]) * rstd[:, None]  # outside K not 0, but grad is
            if WANT_GAMMA:
                of_gamma += tl.sum(grad * n, 0)
            if WANT_X:  # the columns are all there are
                g = grad * factor[None, :]
                out = g - n * (tl.sum(g * n, 1) / K)[:, None]
                if NORM == "layer":
                    out -= (tl.sum(g, 1) / K)[:, None]
                store_tile(grad_x, row, col, gx_row, 1, M, K, out * rstd[:, None])
    if WANT_GAMMA:
        out_gamma = of_gamma.to(grad_gamma.dtype.element_ty)
        tl.store(grad_gamma + part * gg_part + col, out_gamma, mask=col < K)
    if WANT_BIAS:
        out_bias = of_bias.to(grad_bias.dtype.element_ty)
        tl.store(grad_bias + part * gb_part + col, out_bias, mask=col < K)


@triton.jit
def _norm_grad_wide_kernel(
    grad_y,
    x,
    stats,
    gamma,
    grad_x,
    M,
    K,
    gy_row,
    gy_col,
    x_row,
    x_col,
    gx_row,
    NORM: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx of rows that are longer than a tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    mean, rstd = load_statistics(stats, row, M)
    slope = tl.zeros([BLOCK_M], tl.float32)
    centre = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        col = k + lane
        g = load_tile(grad_y, row, col, gy_row, gy_col, M, K).to(tl.float32)
        g = _affine(g, gamma, gamma, col, K, HAS_GAMMA, False)
        n = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
        slope += tl.sum(g * (n - mean[:, None]), 1)
        if NORM == "layer":
            centre += tl.sum(g, 1)
    slope = slope * rstd / K
    centre = centre / K
    for k in range(0, K, BLOCK_K):
        col = k + lane
        grad = load_tile(grad_y, row, col, gy_row, gy_col, M, K).to(tl.float32)
        grad = _affine(grad, gamma, gamma, col, K, HAS_GAMMA, False)
        again = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
        again = (again - mean[:, None]) * rstd[:, None]
        out = (grad - centre[:, None] - again * slope[:, None]) * rstd[:, None]
        store_tile(grad_x, row, col, gx_row, 1, M, K, out)


def norm_grads(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    *,
    norm: str,
    grad_x: Tensor | None,
    grad_gamma: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write those of grad_x ``[M, K]``, grad_gamma ``[K]``, grad_bias ``[K]`` that are given.

    x may be None where only grad_bias is, or without a norm no grad_gamma; stats ``[M, 2]`` and
    gamma lie side by side.
    """
    m, k = grad_y.shape
    config = configs.norm_grads(k)
    tile = {"BLOCK_M": config.rows, "BLOCK_K": config.cols, "num_warps": config.warps}
    left = grad_y if x is None else x
    settings = {"NORM": norm, "HAS_GAMMA": gamma is not None}
    whole = k <= config.cols or norm == "none"  # each column by itself
    if grad_x is not None and not whole:
        _norm_grad_wide_kernel[(triton.cdiv(m, config.rows),)](
            grad_y, left, stats, gamma, grad_x, m, k,
            *grad_y.stride(), *left.stride(), grad_x.stride(0), **settings, **tile,
        )  # fmt: skip
        grad_x = None
    sums = [None if t is None else t.unsqueeze(0) for t in (grad_gamma, grad_bias)]
    if any(t is not None for t in sums):
        tiles = triton.cdiv(k, config.cols)
        parts, chunk = configs.split(m, max(config.rows, configs.LEAST_ROWS), tiles)
    elif grad_x is None:
        return
    else:
        tiles, parts = triton.cdiv(k, config.cols), triton.cdiv(m, config.rows)
        chunk = config.rows
    unused = torch.empty((0, 0, 0), dtype=torch.float32, device=grad_y.device)
    to_gamma, to_bias = (unused if t is None else partials_or(t, parts) for t in sums)
    _norm_grad_kernel[(parts, tiles)](
        grad_y,
        left,
        stats,
        gamma,
        grad_x,
        to_gamma,
        to_bias,
        m,
        k,
        chunk,
        grad_y.stride(0),
        grad_y.stride(1),
        left.stride(0),
        left.stride(1),
        0 if grad_x is None else grad_x.stride(0),
        to_gamma.stride(0),
        to_bias.stride(0),
        WANT_X=grad_x is not None,
        WANT_GAMMA=grad_gamma is not None,
        WANT_BIAS=grad_bias is not None,
        **settings,
        **tile,
    )
    for target, out in zip((to_gamma, to_bias), sums, strict=True):
        if out is not None and parts > 1:
            sum_partials(target, out)
