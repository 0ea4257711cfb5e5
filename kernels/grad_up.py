"""One pass over dy     dS = s · dy B,   dB = dyᵀ S,   db = Σ_m dy

    dy [M,N]  B [N,R]  S [M,R] fp32 (already scaled)  dS [M,R] fp32  dB [N,R]  db [N]

A program owns some columns of dy and a piece of the rows. It keeps its columns of B, walks down
its rows, leaves for each tile the part of dS that its columns give, and keeps its parts of dB and
db in registers until the end. Partial sums are then added in a fixed order (reduce.py).
Traffic: dy once for each 64 ranks; partials of dS, 8·M·R·⌈N/128⌉ bytes written and read, and of dB
and db, 8·N·R·pieces. Where the former outgrow a second reading of dy (configs.reads_dy_twice),
project.py makes dS, and this kernel only dB and db.
Where a batch mixes adapters dS is 0 in the rows of the others, as S is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .precision import Precision
from .reduce import Postponed, partials_or, sum_partials
from .tiles import is_own, load_tile, store_tile


@triton.jit(do_not_specialize=["number"])
def _grad_up_kernel(
    grad_y,
    b,
    s,
    grad_s,
    grad_b,
    grad_bias,
    M,
    N,
    R,
    chunk,
    gy_row,
    gy_col,
    b_row,
    b_col,
    s_row,
    gs_part,
    gs_row,
    gb_part,
    gb_row,
    gb_col,
    bias_part,
    scale,
    adapter,
    number,
    ROUTED: tl.constexpr,
    WANT_S: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile_n = tl.program_id(0)
    tile_r = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if WANT_S:
        up = load_tile(b, col, lane, b_row, b_col, N, R).to(WORK)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    first = part * chunk
    for m in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        tile = load_tile(grad_y, row, col, gy_row, gy_col, M, N)
        if WANT_S:
            term = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            term = tl.dot(tile.to(WORK), up, term, input_precision=PRECISION) * scale
            if ROUTED:
                term = tl.where(is_own(adapter, row, M, number)[:, None], term, 0.0)
            store_tile(grad_s + tile_n.to(tl.int64) * gs_part, row, lane, gs_row, 1, M, R, term)
        if WANT_B:
            side = load_tile(s, row, lane, s_row, 1, M, R).to(WORK)
            acc = tl.dot(tl.trans(tile.to(WORK)), side, acc, input_precision=PRECISION)
        if WANT_BIAS:
            total += tl.sum(tile.to(tl.float32), axis=0)
    if WANT_B:
        store_tile(grad_b + part * gb_part, col, lane, gb_row, gb_col, N, R, acc)
    if WANT_BIAS:
        if tile_r == 0:
            out = total.to(grad_bias.dtype.element_ty)
            tl.store(grad_bias + part * bias_part + col, out, mask=col < N)


def grad_up(
    grad_y: Tensor,
    b: Tensor,
    s: Tensor,
    *,
    scaling: float,
    precision: Precision,
    grad_s: Tensor | None = None,
    grad_b: Tensor | None = None,
    grad_bias: Tensor | None = None,
    adapter: Tensor | None = None,
    number: int = 0,
    postponed: Postponed | None = None,
    capability: int,
) -> None:
    """Write those of grad_s ``[M, R]``, grad_b ``[N, R]``, grad_bias ``[N]`` that are given; with
    ``adapter`` (int32 ``[M]``) grad_s is zero in the rows where it is not ``number``. What is left
    to be summed of grad_b and grad_bias goes to ``postponed``, where that is given."""
    (m, n), rank = grad_y.shape, b.shape[1]
    aligned, of_s = configs.is_aligned(grad_y, b), grad_s is not None
    config = configs.grad_up(rank, precision.wide, aligned, of_s, capability)
    grid_n, grid_r = triton.cdiv(n, config.cols), triton.cdiv(rank, config.rank)
    parts, chunk = configs.split(m, config.rows, grid_n * grid_r)
    unused = torch.empty((0, 0, 0), dtype=torch.float32, device=grad_y.device)
    to_s = unused if grad_s is None else partials_or(grad_s, grid_n)
    to_b = unused if grad_b is None else partials_or(grad_b, parts)
    bias_row = None if grad_bias is None else grad_bias.unsqueeze(0)
    to_bias = unused if bias_row is None else partials_or(bias_row, parts)
    _grad_up_kernel[(grid_n, grid_r, parts)](
        grad_y,
        b,
        s,
        to_s,
        to_b,
        to_bias,
        m,
        n,
        rank,
        chunk,
        grad_y.stride(0),
        grad_y.stride(1),
        b.stride(0),
        b.stride(1),
        s.stride(0),
        to_s.stride(0),
        to_s.stride(1),
        to_b.stride(0),
        to_b.stride(1),
        to_b.stride(2),
        to_bias.stride(0),
        scaling,
        adapter,
        number,
        ROUTED=adapter is not None,
        WANT_S=grad_s is not None,
        WANT_B=grad_b is not None,
        WANT_BIAS=grad_bias is not None,
        WORK=precision.work,
        PRECISION=precision.dot,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
        **configs.registers(capability),
    )
    if grad_s is not None and grid_n > 1:
        sum_partials(to_s, grad_s)
    if parts == 1:
        return
    sums = [(to_b, grad_b), (to_bias, bias_row)]
    left = [(partials, out) for partials, out in sums if out is not None]
    if postponed is not None:
        postponed += left
        return
    for partials, out in left:
        sum_partials(partials, out)
