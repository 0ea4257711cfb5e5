"""Input gradient, persistent     dx = mask ⊙ (dS A) + dy W     (Hopper and later)

    dS [M,R] (with s)  A [R,K]  dy [M,N]  W [N,K]  dx [M,K]; fp16 or bf16
    mask is 0 or 1/(1-p), made again from the seed; see dropout.py.

The mathematics of grad_input.py, for one branch in the model's dtype and rows that tensor
descriptors take; how it goes is in persistent.py. Without dropout both segments are one loop. With
it the rank segment goes first, since its masked product is the accumulator that dy W starts from.
Traffic beyond the frozen layer's dx: dS and A, 2·M·R + R·K elements, and 6·M·R bytes to round dS.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, keep_mask, keep_scale
from .persistent import described, launch_options, programs, store_in_parts
from .tiles import grouped_tile


@triton.jit(do_not_specialize=["threshold"])
def _persistent_grad_input_kernel(
    grad_y,
    weight,
    grad_s,
    a,
    grad_x,
    seed,
    M,
    N,
    K,
    R,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    SPECIALISE: tl.constexpr,
):
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    base = tl.cdiv(N, BLOCK_N)
    steps = base if DROPOUT else base + tl.cdiv(R, BLOCK_N)
    if DROPOUT:
        key = tl.load(seed)
    for tile in tl.range(
        tl.program_id(0),
        down * across,
        tl.num_programs(0),
        flatten=not DROPOUT,
        warp_specialize=SPECIALISE,
    ):
        tile_m, tile_k = grouped_tile(tile, down, across, GROUP)
        row, col = tile_m * BLOCK_M, tile_k * BLOCK_K
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if DROPOUT:
            for r in range(0, R, BLOCK_N):
                acc = tl.dot(grad_s.load([row, r]), a.load([r, col]), acc)
            rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
            keep = keep_mask(key, rows, col, 0, threshold, BLOCK_M, BLOCK_K)
            acc = tl.where(keep, acc * scale, 0.0)
        for step in range(steps):
            if step < base:
                left, right, inner = grad_y, weight, step * BLOCK_N
            else:
                left, right, inner = grad_s, a, (step - base) * BLOCK_N
            acc = tl.dot(left.load([row, inner]), right.load([inner, col]), acc)
        store_in_parts(grad_x, row, col, acc, BLOCK_M, BLOCK_K, PARTS)


def persistent_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: Tensor,
    grad_x: Tensor,
    *,
    dropout: float,
    seed: Tensor | None,
    capability: int,
    multiprocessors: int,
) -> None:
    """Write ``grad_x [M, K]``. Matrices are such as ``persistent.is_describable`` takes, but of
    grad_s ``[M, R]``, which is fp32."""
    (m, n), (rank, k) = grad_y.shape, a.shape
    threshold = drop_threshold(dropout)
    config = configs.persistent(m, capability, masked=threshold > 0)
    tiles = triton.cdiv(m, config.rows) * triton.cdiv(k, config.cols)
    narrow = grad_s.to(grad_y.dtype)
    _persistent_grad_input_kernel[(programs(tiles, multiprocessors),)](
        described(grad_y, config.rows, config.inner),
        described(weight, config.inner, config.cols),
        described(narrow, config.rows, config.inner),
        described(a, config.inner, config.cols),
        described(grad_x, config.rows, config.cols // config.parts),
        seed,
        m,
        n,
        k,
        rank,
        threshold,
        keep_scale(threshold),
        DROPOUT=threshold > 0,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_N=config.inner,
        GROUP=config.group,
        PARTS=config.parts,
        SPECIALISE=config.specialise,
        **launch_options(config),
    )
