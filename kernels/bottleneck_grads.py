"""Sequential adapter, backward

    dh = s · (dy Up) ⊙ φ'(h),    g = dh D,    D = Down ⊙ gamma, t = D 1 (see bottleneck.py)
    dx = rstd · (g − dh·t/K − n · dh·(n Dᵀ)/K) + dy          without a norm dh Down + dy
    G = dhᵀ n,  e = dhᵀ 1:    dDown = G ⊙ gamma + e betaᵀ,  dgamma = Σ_r Down ⊙ G,  dbeta = Downᵀ e
    dUp = dyᵀ (s φ(h)),    dup_bias = Σ_m dy          in grad_up.py

    dy, x, dx [M,K]  dh, S = s φ(h), h [M,R] fp32  Down [R,K]  Up [K,R]  stats [M,2] fp32

The row means of g and of g n, which LayerNorm's gradient takes off, are products of R numbers, so
that no third pass is needed. One program walks over its columns twice, the second time back, as
forward: the second reading of dy and x is from L2 only as far as it holds the rows at work.
Traffic: 2·M·K elements (3 with a norm; 3 and 5 where L2 holds none), and 12·M·R bytes of h, dh and
S; for the parameters dy and x once more, and 8·R·K bytes a piece of the rows, added in a fixed
order. Where there are few rows or many ranks it goes in two, again as forward: dy and x are read
once for each block of lanes, and once for dx. A matrix that a launch does not read has no part in
the choice of its tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate, activate_slope
from .bottleneck import contract, fold, product, sum_pieces
from .moments import load_statistics
from .precision import Precision
from .tiles import load_tile, store_tile


@triton.jit
def _inner_grad(
    grad_s,
    h,
    grad_h,
    s,
    row,
    lane,
    M,
    R,
    scale,
    first,
    ACTIVATION: tl.constexpr,
    WANT_S: tl.constexpr,
):
    """dh of a tile; the ``first`` program of its rows also stores it, and S where it is wanted."""
    inner = load_tile(h, row, lane, R, 1, M, R)
    out = grad_s * activate_slope(inner, ACTIVATION) * scale
    if first:
        store_tile(grad_h, row, lane, R, 1, M, R, out)
        if WANT_S:
            store_tile(s, row, lane, R, 1, M, R, activate(inner, ACTIVATION) * scale)
    return out


@triton.jit
def _row_means(side, across, tilt, lane, K, R, mean, rstd, NORM: tl.constexpr, PIVOT: tl.constexpr):
    """(Σ_k g, Σ_k g n) / K of dh as it is multiplied, and of x Dᵀ, x less its mean if PIVOT."""
    wide = side.to(tl.float32)
    centre = tl.zeros([side.shape[0]], tl.float32)
    if NORM == "layer":
        lean = tl.load(tilt + lane, mask=lane < R, other=0.0)
        centre = tl.sum(wide * lean[None, :], 1) / K
        if not PIVOT:
            across -= mean[:, None] * lean[None, :]
    return centre, tl.sum(wide * across, 1) * rstd / K


@triton.jit
def _write_grad(
    g,
    centre,
    slope,
    mean,
    rstd,
    x,
    grad_y,
    grad_x,
    row,
    col,
    M,
    K,
    x_row,
    x_col,
    gy_row,
    gy_col,
    gx_row,
    NORM: tl.constexpr,
    OWN: tl.constexpr,
):
    if NORM != "none":
        n = load_tile(x, row, col, x_row, x_col, M, K).to(tl.float32)
        n = (n - mean[:, None]) * rstd[:, None]
        g = (g - centre[:, None] - n * slope[:, None]) * rstd[:, None]
    if OWN:
        g += load_tile(grad_y, row, col, gy_row, gy_col, M, K).to(tl.float32)
    store_tile(grad_x, row, col, gx_row, 1, M, K, g)


@triton.jit
def _bottleneck_grad_kernel(
    grad_y,
    x,
    h,
    stats,
    down,
    tilt,
    up,
    grad_x,
    grad_h,
    s,
    M,
    K,
    R,
    gy_row,
    gy_col,
    x_row,
    x_col,
    d_row,
    d_col,
    u_row,
    u_col,
    gx_row,
    scale,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIVOT: tl.constexpr,
    OWN: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_S: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_R)
    nothing = tl.zeros([BLOCK_M], tl.float32)
    grad_s, _, _ = contract(
        tl.zeros([BLOCK_M, BLOCK_R], tl.float32),
        nothing,
        nothing,
        grad_y,
        up,
        row,
        lane,
        0,
        K,
        M,
        K,
        R,
        gy_row,
        gy_col,
        u_col,
        u_row,
        nothing,
        PIVOT=False,
        NORM="none",
        WORK=WORK,
        PRECISION=PRECISION,
        BLOCK_K=BLOCK_K,
    )
    out = _inner_grad(grad_s, h, grad_h, s, row, lane, M, R, scale, True, ACTIVATION, WANT_S)
    if WANT_X:
        side = out.to(WORK)
        mean, rstd = nothing, nothing
        centre, slope = nothing, nothing
        if NORM != "none":
            mean, rstd = load_statistics(stats, row, M)
            across, _, _ = contract(
                tl.zeros([BLOCK_M, BLOCK_R], tl.float32),
                nothing,
                nothing,
                x,
                down,
                row,
                lane,
                0,
                K,
                M,
                K,
                R,
                x_row,
                x_col,
                d_row,
                d_col,
                mean,
                PIVOT=PIVOT,
                NORM="none",
                WORK=WORK,
                PRECISION=PRECISION,
                BLOCK_K=BLOCK_K,
            )
            centre, slope = _row_means(side, across, tilt, lane, K, R, mean, rstd, NORM, PIVOT)
        # from the last tile back: what the walk before read last is the likeliest to be in L2 still
        last = (tl.cdiv(K, BLOCK_K) - 1) * BLOCK_K
        for k in range(0, K, BLOCK_K):
            col = last - k + tl.arange(0, BLOCK_K)
            right = load_tile(down, lane, col, d_row, d_col, R, K).to(WORK)
            g = tl.dot(side, right, input_precision=PRECISION)
            _write_grad(
                g, centre, slope, mean, rstd, x, grad_y, grad_x, row, col, M, K,
                x_row, x_col, gy_row, gy_col, gx_row, NORM, OWN,
            )  # fmt: skip


@triton.jit
def _bottleneck_grad_outer_kernel(
    grad_y,
    x,
    h,
    stats,
    products,
    across,
    down,
    tilt,
    grad_x,
    grad_h,
    s,
    M,
    K,
    R,
    parts,
    piece,
    gy_row,
    gy_col,
    x_row,
    x_col,
    d_row,
    d_col,
    gx_row,
    scale,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIVOT: tl.constexpr,
    OWN: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_S: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """From the pieces of dy Up (``products``) and of x Dᵀ (``across``)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = tl.zeros([BLOCK_M], tl.float32)
    centre = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if NORM != "none":
        mean, rstd = load_statistics(stats, row, M)
    g = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for r in range(0, R, BLOCK_R):
        lane = r + tl.arange(0, BLOCK_R)
        grad_s = sum_pieces(products, piece, row, lane, M, R, parts, BLOCK_M, BLOCK_R)
        first = tl.program_id(1) == 0
        out = _inner_grad(grad_s, h, grad_h, s, row, lane, M, R, scale, first, ACTIVATION, WANT_S)
        if WANT_X:
            side = out.to(WORK)
            if NORM != "none":
                over = sum_pieces(across, piece, row, lane, M, R, parts, BLOCK_M, BLOCK_R)
                more, steeper = _row_means(side, over, tilt, lane, K, R, mean, rstd, NORM, PIVOT)
                centre += more
                slope += steeper
            right = load_tile(down, lane, col, d_row, d_col, R, K).to(WORK)
            g = tl.dot(side, right, g, input_precision=PRECISION)
    if WANT_X:
        _write_grad(
            g, centre, slope, mean, rstd, x, grad_y, grad_x, row, col, M, K,
            x_row, x_col, gy_row, gy_col, gx_row, NORM, OWN,
        )  # fmt: skip


def grad_rows(
    grad_y: Tensor,
    x: Tensor | None,
    h: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scaling: float,
    activation: str,
    norm: str,
    residual_is_x: bool,
    precision: Precision,
    grad_x: Tensor | None,
    grad_h: Tensor,
    s: Tensor | None,
    capability: int,
) -> None:
    """Write dh ``[M, R]``, and dx ``[M, K]`` and S ``[M, R]`` where they are given; all contiguous.

    h and stats lie side by side. x may be None without a norm, or where dx is not wanted.
    """
    (m, k), rank = grad_y.shape, down.shape[0]
    if grad_x is None:
        norm = "none"  # nothing that is wanted hangs on it
    tilt = None
    if norm != "none":
        down, tilt, _ = fold(grad_y.dtype, gamma, None, down, None)
    pivot = norm == "layer" and precision.wide
    read = grad_y if x is None or norm == "none" else x
    config = configs.bottleneck_grad(
        m, rank, precision.wide, configs.is_aligned(grad_y, read, down, up), capability
    )
    settings = {
        "NORM": norm,
        "ACTIVATION": activation,
        "PIVOT": pivot,
        "OWN": residual_is_x,
        "WANT_X": grad_x is not None,
        "WANT_S": s is not None,
        "WORK": precision.work,
        "PRECISION": precision.dot,
        "BLOCK_M": config.rows,
        "BLOCK_K": config.cols,
        "BLOCK_R": config.rank,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    grid_m = triton.cdiv(m, config.rows)
    strides = *grad_y.stride(), *read.stride(), *down.stride()
    if configs.is_fused(m, rank, config):
        _bottleneck_grad_kernel[(grid_m,)](
            grad_y, read, h, stats, down, tilt, up, grad_x, grad_h, s, m, k, rank,
            *strides, *up.stride(), k, scaling, **settings,
        )  # fmt: skip
        return
    plain = {"norm": "none", "precision": precision, "config": config}
    products, _, _ = product(grad_y, up.t(), None, pivot=False, **plain)
    across = products
    if norm != "none":
        across, _, _ = product(read, down, stats, pivot=pivot, **plain)
    tiles = triton.cdiv(k, config.cols) if grad_x is not None else 1
    _bottleneck_grad_outer_kernel[(grid_m, tiles)](
        grad_y, read, h, stats, products, across, down, tilt, grad_x, grad_h, s, m, k, rank,
        len(products), products.stride(0), *strides, k, scaling, **settings,
        **configs.all_registers(),
    )  # fmt: skip


@triton.jit
def _bottleneck_down_kernel(
    grad_h,
    x,
    stats,
    products,
    sums,
    M,
    K,
    R,
    chunk,
    x_row,
    x_col,
    piece,
    NORM: tl.constexpr,
    WANT_PRODUCT: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A piece of G = dhᵀ n and of e = dhᵀ 1."""
    col = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    first = part * chunk
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        side = load_tile(grad_h, row, lane, R, 1, M, R)
        total += tl.sum(side, 0)
        if WANT_PRODUCT:
            tile = load_tile(x, row, col, x_row, x_col, M, K)
            if NORM == "none":
                n = tile.to(WORK)
            else:
                mean, rstd = load_statistics(stats, row, M)
                n = ((tile.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(WORK)
            acc = tl.dot(tl.trans(side.to(WORK)), n, acc, input_precision=PRECISION)
    if WANT_PRODUCT:
        store_tile(products + part * piece, lane, col, K, 1, R, K, acc)
    if tl.program_id(0) == 0:
        tl.store(sums + part * R + lane, total, mask=lane < R)


@triton.jit
def _bottleneck_finish_kernel(
    products,
    sums,
    gamma,
    beta,
    down,
    grad_gamma,
    grad_beta,
    grad_down,
    grad_down_bias,
    K,
    R,
    parts,
    piece,
    d_row,
    d_col,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    WANT_PRODUCT: tl.constexpr,
    WANT_GAMMA: tl.constexpr,
    WANT_BETA: tl.constexpr,
    WANT_DOWN: tl.constexpr,
    WANT_DOWN_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The pieces of G and e, and what comes of them."""
    col = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    of_gamma = tl.zeros([BLOCK_K], tl.float32)
    of_beta = tl.zeros([BLOCK_K], tl.float32)
    for r in range(0, R, BLOCK_R):
        lane = r + tl.arange(0, BLOCK_R)
        e = tl.zeros([BLOCK_R], tl.float32)
        g = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        source = products
        ends = sums + lane
        for _ in range(0, parts):
            e += tl.load(ends, mask=lane < R, other=0.0)
            ends += R
            if WANT_PRODUCT:
                g += load_tile(source, lane, col, K, 1, R, K)
                source += piece  # a pointer moves in 64 bits; part * piece might not
        if WANT_GAMMA or WANT_BETA:
            w = load_tile(down, lane, col, d_row, d_col, R, K).to(tl.float32)
            if WANT_GAMMA:
                of_gamma += tl.sum(w * g, 0)
            if WANT_BETA:
                of_beta += tl.sum(w * e[:, None], 0)
        if WANT_DOWN:
            if HAS_GAMMA:
                g *= tl.load(gamma + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
            if HAS_BETA:
                lift = tl.load(beta + col, mask=col < K, other=0.0).to(tl.float32)
                g += e[:, None] * lift[None, :]
            store_tile(grad_down, lane, col, K, 1, R, K, g)
        if WANT_DOWN_BIAS:
            if tl.program_id(0) == 0:
                out = e.to(grad_down_bias.dtype.element_ty)
                tl.store(grad_down_bias + lane, out, mask=lane < R)
    if WANT_GAMMA:
        tl.store(grad_gamma + col, of_gamma.to(grad_gamma.dtype.element_ty), mask=col < K)
    if WANT_BETA:
        tl.store(grad_beta + col, of_beta.to(grad_beta.dtype.element_ty), mask=col < K)


def grad_parameters(
    grad_h: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    *,
    norm: str,
    precision: Precision,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    grad_down: Tensor | None,
    grad_down_bias: Tensor | None,
    capability: int,
) -> None:
    """Write those of the gradients that are given, all contiguous; vectors lie side by side.

    x may be None where neither grad_gamma nor grad_down is given.
    """
    (m, rank), k = grad_h.shape, down.shape[1]
    product_wanted = grad_gamma is not None or grad_down is not None
    read = x if product_wanted and x is not None else grad_h
    config = configs.bottleneck_down(rank, precision.wide, configs.is_aligned(read), capability)
    grid_k = triton.cdiv(k, config.cols) if product_wanted else 1
    grid_r = triton.cdiv(rank, config.rank)
    # as for the product also where only sums are wanted: the bits must not hang on that
    parts, chunk = configs.split(m, config.rows, triton.cdiv(k, config.cols) * grid_r)
    sums = torch.empty((parts, rank), dtype=torch.float32, device=grad_h.device)
    shape = (parts, rank, k) if product_wanted else (0, 0, 0)
    products = torch.empty(shape, dtype=torch.float32, device=grad_h.device)
    _bottleneck_down_kernel[(grid_k, grid_r, parts)](
        grad_h,
        read,
        stats,
        products,
        sums,
        m,
        k,
        rank,
        chunk,
        *read.stride(),
        products.stride(0),
        NORM=norm,
        WANT_PRODUCT=product_wanted,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    finish = configs.bottleneck_finish()
    only_bias = not product_wanted and grad_beta is None
    _bottleneck_finish_kernel[(1 if only_bias else triton.cdiv(k, finish.cols),)](
        products,
        sums,
        gamma,
        beta,
        down,
        grad_gamma,
        grad_beta,
        grad_down,
        grad_down_bias,
        k,
        rank,
        parts,
        products.stride(0),
        *down.stride(),
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
        WANT_PRODUCT=product_wanted,
        WANT_GAMMA=grad_gamma is not None,
        WANT_BETA=grad_beta is not None,
        WANT_DOWN=grad_down is not None,
        WANT_DOWN_BIAS=grad_down_bias is not None,
        BLOCK_K=finish.cols,
        BLOCK_R=finish.rank,
        num_warps=finish.warps,
        **configs.all_registers(),
    )
