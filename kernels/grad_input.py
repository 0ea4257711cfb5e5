"""Input gradient     dx = Σᵢ mask_i ⊙ (dS_i A_i) + dy W

    dS [M,ΣR] fp32 (with s_i)  A_i [R_i,K]  dy [M,N]  W [N,K]  dx [M,K]
    mask_i is 0 or 1/(1-p_i), made again from the seed; see dropout.py.

The rank segment comes first: the masked product is the accumulator that dy W then starts from, so
no second accumulator is alive in the long loop. dx is rounded once. Traffic beyond the frozen
layer's dx: dS and A, 4·M·R + R·K elements. Without the base segment the kernel writes the rank
part alone for cuBLAS to add dy W on: the backend's plan "split". The same with tensor descriptors,
for sm_90 and later: persistent_grad_input.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, keep_mask, keep_scale
from .precision import Precision
from .tiles import grouped_tile, load_tile, store_tile


@triton.jit(do_not_specialize=["threshold"])
def _grad_input_kernel(
    grad_y,
    weight,
    grad_s,
    a,
    grad_x,
    seed,
    M,
    N,
    K,
    gy_row,
    gy_col,
    w_row,
    w_col,
    gs_row,
    a_row,
    a_col,
    gx_row,
    threshold,
    scale,
    RANKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    offset = 0
    for i in tl.static_range(len(RANKS)):
        term = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for r in range(0, RANKS[i], BLOCK_R):  # a loop: unrolled, its operands would spill
            lane = r + tl.arange(0, BLOCK_R)
            # not left and right: the loop over dy W would carry them, with other types
            side = load_tile(grad_s + offset, row, lane, gs_row, 1, M, RANKS[i])
            down = load_tile(a[i], lane, col, a_row[i], a_col[i], RANKS[i], K)
            term = tl.dot(side.to(WORK), down.to(WORK), term, input_precision=PRECISION)
        if DROPOUT[i]:
            keep = keep_mask(
                tl.load(seed), row, tile_k * BLOCK_K, i, threshold[i], BLOCK_M, BLOCK_K
            )
            term = tl.where(keep, term * scale[i], 0.0)
        if i == 0:
            acc = term
        else:
            acc += term
        offset += RANKS[i]
    if HAS_BASE:
        for n in range(0, N, BLOCK_N):
            inner = n + tl.arange(0, BLOCK_N)
            # names of their own: Triton would carry left and right from above into this loop
            dy = load_tile(grad_y, row, inner, gy_row, gy_col, M, N)
            frozen = load_tile(weight, inner, col, w_row, w_col, N, K)
            acc = tl.dot(dy, frozen, acc, input_precision="ieee")
    store_tile(grad_x, row, col, gx_row, 1, M, K, acc)


def grad_input_gemm(
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: list[Tensor],
    grad_x: Tensor,
    *,
    dropout: list[float],
    seed: Tensor | None,
    precision: Precision,
    capability: int,
    has_base: bool = True,
) -> None:
    """Write ``grad_x [M, K]``; without ``dy W`` where not ``has_base``."""
    (m, n), k = grad_y.shape, weight.shape[1]
    plain = configs.is_plain(grad_y, weight, [t.shape[0] for t in a])
    config = configs.grad_input(m, grad_y.dtype, capability, precision.wide, plain)
    thresholds = [drop_threshold(p) for p in dropout]
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(k, config.cols),)
    _grad_input_kernel[grid](
        grad_y,
        weight,
        grad_s,
        tuple(a),
        grad_x,
        seed,
        m,
        n,
        k,
        grad_y.stride(0),
        grad_y.stride(1),
        weight.stride(0),
        weight.stride(1),
        grad_s.stride(0),
        tuple(t.stride(0) for t in a),
        tuple(t.stride(1) for t in a),
        grad_x.stride(0),
        tuple(thresholds),
        tuple(keep_scale(t) for t in thresholds),
        RANKS=tuple(t.shape[0] for t in a),
        DROPOUT=tuple(t > 0 for t in thresholds),
        HAS_BASE=has_base,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_N=config.inner,
        BLOCK_R=config.rank,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )
