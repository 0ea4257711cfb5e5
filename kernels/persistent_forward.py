"""Forward GEMM of two segments, persistent     y = x Wᵀ + S Bᵀ + bias     (Hopper and later)

    x [M,K]  W [N,K]  S [M,R] (already scaled)  B [N,R]  bias [N]  y [M,N]; fp16 or bf16

The mathematics of forward.py, for one branch in the model's dtype and rows that tensor descriptors
take; how it goes is in persistent.py. S is rounded to the model's dtype first, as its operand of
the product is there too. Traffic beyond the frozen layer: S and B, 2·M·R + N·R elements, and
6·M·R bytes to round S; R is padded to whole blocks of the contraction in operations, not in bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .persistent import described, launch_options, programs, store_in_parts
from .tiles import grouped_tile


@triton.jit
def _persistent_forward_kernel(
    x,
    weight,
    s,
    b,
    bias,
    y,
    M,
    N,
    K,
    R,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    SPECIALISE: tl.constexpr,
):
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    base = tl.cdiv(K, BLOCK_K)
    steps = base + tl.cdiv(R, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0),
        down * across,
        tl.num_programs(0),
        flatten=True,
        warp_specialize=SPECIALISE,
    ):
        tile_m, tile_n = grouped_tile(tile, down, across, GROUP)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            if step < base:
                left, right, inner = x, weight, step * BLOCK_K
            else:
                left, right, inner = s, b, (step - base) * BLOCK_K
            acc = tl.dot(left.load([row, inner]), right.load([col, inner]).T, acc)
        if HAS_BIAS:
            lane = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + lane, mask=lane < N, other=0.0).to(tl.float32)[None, :]
        store_in_parts(y, row, col, acc, BLOCK_M, BLOCK_N, PARTS)


def persistent_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    y: Tensor,
    *,
    capability: int,
    multiprocessors: int,
) -> None:
    """Write ``y [M, N]``. Matrices are such as ``persistent.is_describable`` takes, but of s
    ``[M, R]``, which is fp32."""
    (m, k), (n, rank) = x.shape, b.shape
    config = configs.persistent(m, capability, masked=False)
    tiles = triton.cdiv(m, config.rows) * triton.cdiv(n, config.cols)
    narrow = s.to(x.dtype)
    _persistent_forward_kernel[(programs(tiles, multiprocessors),)](
        described(x, config.rows, config.inner),
        described(weight, config.cols, config.inner),
        described(narrow, config.rows, config.inner),
        described(b, config.cols, config.inner),
        bias,
        described(y, config.rows, config.cols // config.parts),
        m,
        n,
        k,
        rank,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_K=config.inner,
        GROUP=config.group,
        PARTS=config.parts,
        SPECIALISE=config.specialise,
        **launch_options(config),
    )
