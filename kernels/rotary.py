"""Rotary position embedding     (Su et al. 2021)

    y₁ = x₁ cos₁ − x₂ sin₁,  y₂ = x₂ cos₂ + x₁ sin₂
    dx₁ = dy₁ cos₁ + dy₂ sin₂,  dx₂ = dy₂ cos₂ − dy₁ sin₁          indices: halves of a head

    x, y [B,H,L,D]  cos, sin [B or 1,L,D]; computed in fp32, rounded once

A program turns the same tokens of several heads, for which it reads the angles once. Traffic: x and
y once, cos and sin once for each 8 heads, of which all but the first come from L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import load_tile, store_tile


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    y,
    H,
    L,
    half,
    x_batch,
    x_head,
    x_row,
    x_col,
    x_half,
    t_batch,
    t_row,
    y_batch,
    y_head,
    y_row,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    lane = tl.arange(0, BLOCK_D)
    table = b * t_batch
    cos1 = load_tile(cos + table, row, lane, t_row, 1, L, half).to(tl.float32)
    cos2 = load_tile(cos + table + half, row, lane, t_row, 1, L, half).to(tl.float32)
    sin1 = load_tile(sin + table, row, lane, t_row, 1, L, half).to(tl.float32)
    sin2 = load_tile(sin + table + half, row, lane, t_row, 1, L, half).to(tl.float32)
    first = tl.program_id(1) * HEADS
    source = x + b * x_batch + first.to(tl.int64) * x_head
    target = y + b * y_batch + first.to(tl.int64) * y_head
    for _ in range(first, tl.minimum(first + HEADS, H)):
        x1 = load_tile(source, row, lane, x_row, x_col, L, half).to(tl.float32)
        x2 = load_tile(source + x_half, row, lane, x_row, x_col, L, half).to(tl.float32)
        if BACKWARD:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        store_tile(target, row, lane, y_row, 1, L, half, y1)
        store_tile(target + half, row, lane, y_row, 1, L, half, y2)
        source += x_head
        target += y_head


def rotary(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, backward: bool) -> None:
    """Write ``y``: x turned by the angles, or back. The elements of a head of y, cos and sin lie
    side by side; cos and sin ``[B or 1, L, D]`` have the same strides."""
    b, h, l, d = x.shape  # noqa: E741
    config = configs.rotary(h, d)
    grid = (b * triton.cdiv(l, config.rows), triton.cdiv(h, config.heads))
    _rotary_kernel[grid](
        x,
        cos,
        sin,
        y,
        h,
        l,
        d // 2,
        *x.stride(),
        d // 2 * x.stride(3),  # here: a product of two numbers of 32 bits is one in a kernel
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        *y.stride()[:3],
        BACKWARD=backward,
        HEADS=config.heads,
        BLOCK_L=config.rows,
        BLOCK_D=config.lanes,
        num_warps=config.warps,
    )
