"""Sequential adapter, forward     (Houlsby et al. 2019; Pfeiffer et al. 2021)

    h = norm(x) Downᵀ + down_bias,    y = residual + s · φ(h) Upᵀ + up_bias

    x, residual, y [M,K]  Down [R,K]  Up [K,R]  h [M,R] fp32  stats [M,2] fp32

The norm is folded into the product: with D = Down ⊙ gamma, t = D 1, d = Down beta + down_bias,

    h = rstd · (x Dᵀ − mean · t) + d

so that x is read once for both, its statistics and the product. Where the product is in fp32 and
the norm takes a mean off, a first guess at it is taken off before: x Dᵀ alone would lose the digits
of rows whose mean is large. Half types multiply exactly, and their rounding of D outweighs that.

One program keeps h of its rows in registers and walks over the columns twice, the second time from
the last to the first. All programs that run at once walk in step: x comes from DRAM and, as the
residual, once more, but for the end of the rows that L2 still holds; from L2 altogether only where
the rows at work, about 256 programs' on an H100, fit in it. Traffic: 2·M·K elements and h, or
3·M·K. Where there are few rows, or more ranks than a program has lanes for, it goes in two: the
product, cut among programs, whose partial sums (4·M·R·pieces bytes) the second adds up in a fixed
order; x is then read once for each block of lanes, 64, or 16 in fp32 and where a stride or a width
(a rank of 24) does not divide by 16, and once as the residual. A norm takes one launch more, for D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate
from .moments import inverse_root, join_moments, store_statistics, tile_moments
from .precision import Precision
from .tiles import load_tile, store_tile


@triton.jit
def _fold_kernel(
    down,
    gamma,
    beta,
    down_bias,
    folded,
    tilt,
    shift,
    K,
    d_row,
    d_col,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_K], tl.float32)
    shifts = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        inside = col < K
        value = tl.load(down + r * d_row + col.to(tl.int64) * d_col, mask=inside, other=0.0)
        value = value.to(tl.float32)
        if HAS_BETA:
            shifts += value * tl.load(beta + col, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAMMA:
            value *= tl.load(gamma + col, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(folded.dtype.element_ty)
        tl.store(folded + r * K + col, rounded, mask=inside)
        sums += rounded.to(tl.float32)  # of what is multiplied: the mean cancels exactly
    total = tl.sum(shifts, 0)
    if HAS_BIAS:
        total += tl.load(down_bias + r).to(tl.float32)
    tl.store(tilt + r, tl.sum(sums, 0))
    tl.store(shift + r, total)


def fold(
    x: torch.dtype, gamma: Tensor | None, beta: Tensor | None, down: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(D [R, K], t [R], d [R])`` of the module's text; D in the dtype that the product is in."""
    rank, k = down.shape
    dtype = torch.promote_types(x, down.dtype)
    folded = torch.empty((rank, k), dtype=dtype, device=down.device)
    tilt = torch.empty((rank,), dtype=torch.float32, device=down.device)
    shift = torch.empty((rank,), dtype=torch.float32, device=down.device)
    config = configs.fold(k)
    _fold_kernel[(rank,)](
        down,
        gamma,
        beta,
        bias,
        folded,
        tilt,
        shift,
        k,
        down.stride(0),
        down.stride(1),
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
        HAS_BIAS=bias is not None,
        BLOCK_K=config.cols,
        num_warps=config.warps,
    )
    return folded, tilt, shift


@triton.jit
def contract(
    acc,
    mean,
    m2,
    x,
    matrix,
    row,
    lane,
    first,
    last,
    M,
    K,
    R,
    x_row,
    x_col,
    m_row,
    m_col,
    pivot,
    PIVOT: tl.constexpr,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc += (x − pivot) matrixᵀ over columns ``first`` … ``last``, matrix [R,K]; and mean and m2
    of these columns of x, unless NORM is "none"."""
    for k in range(first, last, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        tile = load_tile(x, row, col, x_row, x_col, M, K)
        side = load_tile(matrix, lane, col, m_row, m_col, R, K)
        if NORM != "none":
            count = tl.minimum(last - k, BLOCK_K) * 1.0
            more_mean, more_m2 = tile_moments(tile.to(tl.float32), col, K, count, NORM == "layer")
            seen = (k - first) * 1.0
            mean, m2 = join_moments(seen, mean, m2, count, more_mean, more_m2, NORM == "layer")
        left = tile.to(WORK)
        if PIVOT:
            left -= pivot[:, None]  # outside K the other side is zero
        acc = tl.dot(left, tl.trans(side.to(WORK)), acc, input_precision=PRECISION)
    return acc, mean, m2


@triton.jit
def _guess(x, row, M, K, x_row, x_col, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean of the first columns of each row."""
    tile = load_tile(x, row, tl.arange(0, BLOCK_K), x_row, x_col, M, K)
    return tl.sum(tile.to(tl.float32), 1) / tl.minimum(K, BLOCK_K)


@triton.jit
def _inner(
    acc,
    lane,
    R,
    mean,
    rstd,
    pivot,
    tilt,
    shift,
    NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """h of the module's text from the product."""
    h = acc
    if NORM == "layer":
        lean = tl.load(tilt + lane, mask=lane < R, other=0.0)
        h -= (mean - pivot)[:, None] * lean[None, :]
    if NORM != "none":
        h *= rstd[:, None]
    if HAS_SHIFT:
        h += tl.load(shift + lane, mask=lane < R, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def _write(
    out,
    residual,
    up_bias,
    y,
    row,
    col,
    M,
    K,
    res_row,
    res_col,
    y_row,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    if HAS_UP_BIAS:
        out += tl.load(up_bias + col, mask=col < K, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        out += load_tile(residual, row, col, res_row, res_col, M, K).to(tl.float32)
    store_tile(y, row, col, y_row, 1, M, K, out)


@triton.jit
def _bottleneck_kernel(
    x,
    residual,
    down,
    tilt,
    shift,
    up,
    up_bias,
    y,
    h,
    stats,
    M,
    K,
    R,
    x_row,
    x_col,
    res_row,
    res_col,
    d_row,
    d_col,
    u_row,
    u_col,
    y_row,
    scale,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIVOT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_R)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    if PIVOT:
        pivot = _guess(x, row, M, K, x_row, x_col, BLOCK_M, BLOCK_K)
    acc, mean, m2 = contract(
        tl.zeros([BLOCK_M, BLOCK_R], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
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
        pivot,
        PIVOT=PIVOT,
        NORM=NORM,
        WORK=WORK,
        PRECISION=PRECISION,
        BLOCK_K=BLOCK_K,
    )
    rstd = inverse_root(m2, K, eps)
    if NORM != "none":
        store_statistics(stats, row, M, mean, rstd)
    inner = _inner(acc, lane, R, mean, rstd, pivot, tilt, shift, NORM, HAS_SHIFT)
    store_tile(h, row, lane, R, 1, M, R, inner)
    side = (activate(inner, ACTIVATION) * scale).to(WORK)
    # from the last tile back: what the walk before read last is the likeliest to be in L2 still
    last = (tl.cdiv(K, BLOCK_K) - 1) * BLOCK_K
    for k in range(0, K, BLOCK_K):
        col = last - k + tl.arange(0, BLOCK_K)
        right = load_tile(up, col, lane, u_row, u_col, K, R).to(WORK)
        out = tl.dot(side, tl.trans(right), input_precision=PRECISION)
        _write(
            out, residual, up_bias, y, row, col, M, K, res_row, res_col, y_row,
            HAS_UP_BIAS, HAS_RESIDUAL,
        )  # fmt: skip


@triton.jit
def _bottleneck_inner_kernel(
    x,
    matrix,
    stats,
    partials,
    moments,
    M,
    K,
    R,
    chunk,
    x_row,
    x_col,
    m_row,
    m_col,
    piece,
    PIVOT: tl.constexpr,
    NORM: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A piece of (x − pivot) matrixᵀ. The pivot is the mean where ``stats`` has it, else a guess,
    kept in ``moments [pieces, 3, M]`` with the mean and m2 of the piece."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    if PIVOT:
        if NORM == "none":
            pivot = tl.load(stats + row * 2, mask=row < M, other=0.0)
        else:
            pivot = _guess(x, row, M, K, x_row, x_col, BLOCK_M, BLOCK_K)
    first = part * chunk
    acc, mean, m2 = contract(
        tl.zeros([BLOCK_M, BLOCK_R], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        x,
        matrix,
        row,
        lane,
        first,
        tl.minimum(first + chunk, K),
        M,
        K,
        R,
        x_row,
        x_col,
        m_row,
        m_col,
        pivot,
        PIVOT=PIVOT,
        NORM=NORM,
        WORK=WORK,
        PRECISION=PRECISION,
        BLOCK_K=BLOCK_K,
    )
    store_tile(partials + part.to(tl.int64) * piece, row, lane, R, 1, M, R, acc)
    if NORM != "none":
        if tl.program_id(1) == 0:
            target = moments + part.to(tl.int64) * 3 * M + row
            tl.store(target, mean, mask=row < M)
            tl.store(target + M, m2, mask=row < M)
            tl.store(target + 2 * M, pivot, mask=row < M)


@triton.jit
def sum_pieces(
    partials, piece, row, lane, M, R, parts, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Tile [row, lane] of the sum of ``partials [parts, M, R]``, in the order of the parts."""
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    source = partials
    for _ in range(0, parts):
        total += load_tile(source, row, lane, R, 1, M, R)
        source += piece  # a pointer moves in 64 bits; part * piece might not
    return total


@triton.jit
def _bottleneck_outer_kernel(
    partials,
    moments,
    residual,
    tilt,
    shift,
    up,
    up_bias,
    y,
    h,
    stats,
    M,
    K,
    R,
    parts,
    chunk,
    piece,
    res_row,
    res_col,
    u_row,
    u_col,
    y_row,
    scale,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    pivot = tl.zeros([BLOCK_M], tl.float32)
    if NORM != "none":
        source = moments + row
        pivot = tl.load(source + 2 * M, mask=row < M, other=0.0)
        for p in range(0, parts):
            more_mean = tl.load(source, mask=row < M, other=0.0)
            more_m2 = tl.load(source + M, mask=row < M, other=0.0)
            count = tl.minimum(K - p * chunk, chunk) * 1.0
            seen = (p * chunk) * 1.0
            mean, m2 = join_moments(seen, mean, m2, count, more_mean, more_m2, NORM == "layer")
            source += 3 * M
    rstd = inverse_root(m2, K, eps)
    if NORM != "none":
        if tl.program_id(1) == 0:
            store_statistics(stats, row, M, mean, rstd)
    out = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for r in range(0, R, BLOCK_R):
        lane = r + tl.arange(0, BLOCK_R)
        acc = sum_pieces(partials, piece, row, lane, M, R, parts, BLOCK_M, BLOCK_R)
        inner = _inner(acc, lane, R, mean, rstd, pivot, tilt, shift, NORM, HAS_SHIFT)
        if tl.program_id(1) == 0:
            store_tile(h, row, lane, R, 1, M, R, inner)
        side = (activate(inner, ACTIVATION) * scale).to(WORK)
        right = load_tile(up, col, lane, u_row, u_col, K, R).to(WORK)
        out = tl.dot(side, tl.trans(right), out, input_precision=PRECISION)
    _write(
        out, residual, up_bias, y, row, col, M, K, res_row, res_col, y_row,
        HAS_UP_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def product(
    x: Tensor,
    matrix: Tensor,
    stats: Tensor | None,
    *,
    norm: str,
    pivot: bool,
    precision: Precision,
    config: configs.Skinny,
) -> tuple[Tensor, Tensor, int]:
    """Partial sums of ``(x − pivot) matrixᵀ`` ``[pieces, M, R]`` for x ``[M, K]`` and matrix
    ``[R, K]``, the moments ``[pieces, 3, M]`` of the pieces, and the columns of a piece."""
    (m, k), rank = x.shape, matrix.shape[0]
    grid_m, grid_r = triton.cdiv(m, config.rows), triton.cdiv(rank, config.rank)
    # half as many pieces as elsewhere: every tile of columns reads them all
    parts, chunk = configs.split(k, config.cols, 2 * grid_m * grid_r)
    partials = torch.empty((parts, m, rank), dtype=torch.float32, device=x.device)
    kept = 0 if norm == "none" else 3
    moments = torch.empty((parts, kept, m), dtype=torch.float32, device=x.device)
    _bottleneck_inner_kernel[(grid_m, grid_r, parts)](
        x,
        matrix,
        stats,
        partials,
        moments,
        m,
        k,
        rank,
        chunk,
        *x.stride(),
        *matrix.stride(),
        partials.stride(0),
        PIVOT=pivot,
        NORM=norm,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.all_registers(),
    )
    return partials, moments, chunk


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    y: Tensor,
    h: Tensor,
    stats: Tensor,
    *,
    scaling: float,
    eps: float,
    activation: str,
    norm: str,
    precision: Precision,
) -> None:
    """Write ``y [M, K]``, ``h [M, R]`` and ``stats [M, 2]`` (all contiguous; no stats where norm is
    "none"). Vectors lie side by side, matrices have any strides."""
    (m, k), rank = x.shape, down.shape[0]
    tilt, shift = None, down_bias
    if norm != "none":
        down, tilt, shift = fold(x.dtype, gamma, beta, down, down_bias)
    pivot = norm == "layer" and precision.wide
    read = (x, down, up) if residual is None else (x, residual, down, up)
    config = configs.bottleneck(m, rank, precision.wide, configs.is_aligned(*read))
    beside = (0, 0) if residual is None else residual.stride()
    settings = {
        "NORM": norm,
        "ACTIVATION": activation,
        "HAS_SHIFT": shift is not None,
        "HAS_UP_BIAS": up_bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "WORK": precision.work,
        "PRECISION": precision.dot,
        "BLOCK_M": config.rows,
        "BLOCK_K": config.cols,
        "BLOCK_R": config.rank,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    grid_m = triton.cdiv(m, config.rows)
    if configs.is_fused(m, rank, config):
        _bottleneck_kernel[(grid_m,)](
            x, residual, down, tilt, shift, up, up_bias, y, h, stats, m, k, rank,
            *x.stride(), *beside, *down.stride(), *up.stride(), y.stride(0), scaling, eps,
            PIVOT=pivot, **settings,
        )  # fmt: skip
        return
    partials, moments, chunk = product(
        x, down, None, norm=norm, pivot=pivot, precision=precision, config=config
    )
    _bottleneck_outer_kernel[(grid_m, triton.cdiv(k, config.cols))](
        partials, moments, residual, tilt, shift, up, up_bias, y, h, stats, m, k, rank,
        len(partials), chunk, partials.stride(0), *beside, *up.stride(), y.stride(0), scaling, eps,
        **settings, **configs.all_registers(),
    )  # fmt: skip
