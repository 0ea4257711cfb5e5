"""Quantised frozen weights     y = x Wᵀ + S Bᵀ + bias,   W = codes · scales

    x [M,K]  W [N,K] int8 (a scale a row) or NF4 (two codes a byte, a scale a block)  y [M,N]
    S [M,ΣR] fp32 (already scaled)  B_i [N,R_i]  bias [N]       (QLoRA: Dettmers et al. 2023, eq. 5)

For few rows the codes are read in the K loop and made to numbers in registers: 1 or ½ byte an
element instead of 2. For many, each tile of rows would make them again, so W is written once to
memory that is given back after the product (dequantize). Either way an element is codes · scales in
fp32, rounded to the dtype of x: the number of rows does not decide what W is.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .precision import Precision
from .tiles import grouped_tile, load_tile, store_tile


@triton.jit
def _dequantize_kernel(
    codes, scales, table, weight, count, block, NF4: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = index < count
    if NF4:
        pair = tl.load(codes + index // 2, mask=inside, other=0).to(tl.int32)
        value = tl.load(table + tl.where(index % 2 == 0, pair >> 4, pair & 15))
    else:
        value = tl.load(codes + index, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scales + index // block, mask=inside, other=0.0)
    tl.store(weight + index, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _weight_tile(
    codes,
    scales,
    table,
    row,
    k,
    N,
    K,
    block,
    NF4: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """[ROWS, COLS] of W in fp32 from column k on, zero outside. A tile of NF4 has one scale a row:
    COLS divides the block, and the block divides K."""
    if NF4:
        half = k // 2 + tl.arange(0, COLS // 2)
        pair = load_tile(codes, row, half, K // 2, 1, N, K // 2).to(tl.int32)
        both = tl.join(tl.load(table + (pair >> 4)), tl.load(table + (pair & 15)))
        value = tl.reshape(both, [ROWS, COLS])
        place = row.to(tl.int64) * (K // block) + k // block
    else:
        value = load_tile(codes, row, k + tl.arange(0, COLS), K, 1, N, K).to(tl.float32)
        place = row.to(tl.int64)
    return value * tl.load(scales + place, mask=row < N, other=0.0)[:, None]


@triton.jit
def _forward_quantized_kernel(
    x,
    codes,
    scales,
    table,
    bias,
    s,
    b,
    y,
    M,
    N,
    K,
    block,
    x_row,
    x_col,
    s_row,
    b_row,
    b_col,
    RANKS: tl.constexpr,
    NF4: tl.constexpr,
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
    for k in range(0, K, BLOCK_K):
        left = load_tile(x, row, k + tl.arange(0, BLOCK_K), x_row, x_col, M, K)
        frozen = _weight_tile(codes, scales, table, col, k, N, K, block, NF4, BLOCK_N, BLOCK_K)
        acc = tl.dot(left, tl.trans(frozen.to(left.dtype)), acc, input_precision="ieee")
    offset = 0
    for i in tl.static_range(len(RANKS)):
        for r in range(0, RANKS[i], BLOCK_R):  # a loop: unrolled, its operands would spill
            lane = r + tl.arange(0, BLOCK_R)
            side = load_tile(s + offset, row, lane, s_row, 1, M, RANKS[i])
            up = load_tile(b[i], col, lane, b_row[i], b_col[i], N, RANKS[i])
            acc = tl.dot(side.to(WORK), tl.trans(up.to(WORK)), acc, input_precision=PRECISION)
        offset += RANKS[i]
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, row, col, N, 1, M, N, acc)


def dequantize(
    codes: Tensor, scales: Tensor, table: Tensor | None, weight: Tensor, *, nf4: bool, block: int
) -> None:
    """Write ``weight [N, K]`` (contiguous); codes and scales lie side by side. ``table``: the
    values of NF4 (fp32 ``[16]``), which int8 has none of."""
    count, size = weight.numel(), configs.DEQUANTIZE
    _dequantize_kernel[(triton.cdiv(count, size),)](
        codes, scales, table, weight, count, block, NF4=nf4, BLOCK_SIZE=size
    )


def takes(m: int, k: int, nf4: bool, block: int) -> bool:
    """Whether :func:`forward_quantized` is for these: few rows, and one scale a tile and row."""
    whole = not nf4 or (k % block == 0 and block % configs.CODES == 0)
    return m <= configs.FEW_ROWS and whole


def forward_quantized(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    b: list[Tensor],
    y: Tensor,
    *,
    nf4: bool,
    block: int,
    precision: Precision,
) -> None:
    """Write ``y [M, N]`` (contiguous) where :func:`takes` says so."""
    (m, k), n = x.shape, y.shape[1]
    config = configs.quantized(m, x.dtype)
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.cols),)
    _forward_quantized_kernel[grid](
        x,
        codes,
        scales,
        table,
        bias,
        s,
        tuple(b),
        y,
        m,
        n,
        k,
        block,
        *x.stride(),
        s.stride(0),
        tuple(t.stride(0) for t in b),
        tuple(t.stride(1) for t in b),
        RANKS=tuple(t.shape[1] for t in b),
        NF4=nf4,
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
    )
