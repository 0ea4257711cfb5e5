"""Forward GEMM of two segments     y = x Wᵀ + S Bᵀ + bias     (LoRA: Hu et al. 2021, eq. 3)

    x [M,K]  W [N,K]  S [M,ΣR] fp32 (already scaled)  B_i [N,R_i]  bias [N]  y [M,N]

The contraction runs over x Wᵀ and on over S Bᵀ in one fp32 accumulator; the bias joins in the
epilogue and y is rounded once. Traffic beyond the frozen layer: S and B, 4·M·R + N·R elements.
Without its base segment (HAS_BASE off) the kernel writes S Bᵀ + bias alone, memory-bound, for
cuBLAS to add x Wᵀ on: the backend's plan "split".
The same with tensor descriptors, for sm_90 and later: persistent_forward.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .precision import Precision
from .segments import add_ups
from .tiles import add_product, grouped_tile, load_tile, store_tile


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    s,
    b,
    y,
    M,
    N,
    K,
    x_row,
    x_col,
    w_row,
    w_col,
    s_row,
    b_row,
    b_col,
    y_row,
    RANKS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BASE:
        for k in range(0, K, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K)
            left = load_tile(x, row, inner, x_row, x_col, M, K)
            right = load_tile(weight, col, inner, w_row, w_col, N, K)
            acc = add_product(acc, left, tl.trans(right))
    acc = add_ups(acc, s, b, row, col, M, N, s_row, b_row, b_col, RANKS, WORK, PRECISION, BLOCK_R)
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, row, col, y_row, 1, M, N, acc)


def forward_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: list[Tensor],
    y: Tensor,
    *,
    precision: Precision,
    capability: int,
    has_base: bool = True,
) -> None:
    """Write ``y [M, N] = x Wᵀ + S Bᵀ + bias``, or without ``x Wᵀ`` where not ``has_base``."""
    (m, k), n = x.shape, weight.shape[0]
    plain = configs.is_plain(x, weight, [t.shape[1] for t in b])
    config = configs.gemm(m, n, x.dtype, capability, precision.wide, plain)
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.cols),)
    _forward_kernel[grid](
        x,
        weight,
        bias,
        s,
        tuple(b),
        y,
        m,
        n,
        k,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        s.stride(0),
        tuple(t.stride(0) for t in b),
        tuple(t.stride(1) for t in b),
        y.stride(0),
        RANKS=tuple(t.shape[1] for t in b),
        HAS_BASE=has_base,
        HAS_BIAS=bias is not None,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_K=config.inner,
        BLOCK_R=config.rank,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.registers(capability),
    )
