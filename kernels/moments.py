"""Mean and spread of the rows of a matrix, tile by tile     (Chan, Golub and LeVeque 1983)

    mean ← mean + (mean' − mean) n'/(n + n'),    m2 ← m2 + m2' + (mean' − mean)² n n'/(n + n')

m2 = Σ (x − mean)². The difference of E x² and (E x)² would lose the digits of a variance that is
small beside the mean. For RMSNorm the mean is 0 by definition and m2 = Σ x².
"""

import triton
import triton.language as tl


@triton.jit
def tile_moments(tile, col, K, count, LAYER: tl.constexpr):
    """(mean, m2) of the rows of an fp32 tile with ``count`` columns inside, zero outside."""
    mean = tl.zeros([tile.shape[0]], tl.float32)
    off = tile
    if LAYER:
        mean = tl.sum(tile, 1) / count
        off = tl.where(col[None, :] < K, tile - mean[:, None], 0.0)
    return mean, tl.sum(off * off, 1)


@triton.jit
def join_moments(seen, mean, m2, count, more_mean, more_m2, LAYER: tl.constexpr):
    """(mean, m2) of ``seen`` elements and of ``count`` more; both counts are fp32."""
    out = m2 + more_m2
    if LAYER:
        gap = more_mean - mean
        mean += gap * (count / (seen + count))
        out += gap * gap * (seen * count / (seen + count))
    return mean, out


@triton.jit
def inverse_root(m2, K, eps):
    """rstd = 1/√(m2/K + eps), correctly rounded at each step: it is one number a row."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, K * 1.0) + eps))


@triton.jit
def store_statistics(stats, row, M, mean, rstd):
    """Write ``stats [M, 2]``."""
    tl.store(stats + row * 2, mean, mask=row < M)
    tl.store(stats + row * 2 + 1, rstd, mask=row < M)


@triton.jit
def load_statistics(stats, row, M):
    """(mean, rstd) of rows; zero outside."""
    mean = tl.load(stats + row * 2, mask=row < M, other=0.0)
    return mean, tl.load(stats + row * 2 + 1, mask=row < M, other=0.0)
