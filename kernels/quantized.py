"""Quantised frozen weights     (QLoRA: Dettmers et al. 2023, eq. 5)

    y = x Wᵀ + S Bᵀ + bias,   dx = Σᵢ mask_i ⊙ (dS_i A_i) + dy W,   W = codes · scales

    x, dx [M,K]  y, dy [M,N]  W [N,K] int8, a scale a row, or NF4, two a byte and a scale a block
    S, dS [M,ΣR] fp32 (with s)  A_i [R_i,K]  B_i [N,R_i]  bias [N]; the rank parts: segments.py

For few rows the codes are read in the long loop and made to numbers in registers: 1 or ½ byte an
element instead of 2. For many, each tile of rows would make them again, so W is written once to
memory that is given back after the product (dequantize). Either way an element is codes · scales in
fp32, rounded to the dtype of x: the number of rows does not decide what W is.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .grad_input import Downs
from .precision import Precision
from .segments import add_ups, masked_downs
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
    acc = add_ups(acc, s, b, row, col, M, N, s_row, b_row, b_col, RANKS, WORK, PRECISION, BLOCK_R)
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
    """Whether the products here are for these: few rows, and one scale a tile and row."""
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


@triton.jit
def _grad_input_quantized_kernel(
    grad_y,
    codes,
    scales,
    table,
    grad_s,
    a,
    grad_x,
    seed,
    M,
    N,
    K,
    block,
    gy_row,
    gy_col,
    gs_row,
    a_row,
    a_col,
    stream,
    threshold,
    scale,
    RANKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NF4: tl.constexpr,
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
    first = tile_k * BLOCK_K
    acc = masked_downs(
        grad_s, a, seed, row, first, M, K, gs_row, a_row, a_col, stream, threshold, scale,
        RANKS, DROPOUT, WORK, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    for n in range(0, N, BLOCK_N):
        inner = n + tl.arange(0, BLOCK_N)
        dy = load_tile(grad_y, row, inner, gy_row, gy_col, M, N)
        frozen = _weight_tile(
            codes, scales, table, inner, first, N, K, block, NF4, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(dy, frozen.to(dy.dtype), acc, input_precision="ieee")
    store_tile(grad_x, row, first + tl.arange(0, BLOCK_K), K, 1, M, K, acc)


def grad_input_quantized(
    grad_y: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor | None,
    downs: Downs,
    grad_x: Tensor,
    *,
    nf4: bool,
    block: int,
    precision: Precision,
) -> None:
    """Write ``grad_x [M, K]`` (contiguous) where :func:`takes` says so."""
    (m, n), k = grad_y.shape, grad_x.shape[1]
    config = configs.quantized(m, grad_y.dtype)
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(k, config.cols),)
    _grad_input_quantized_kernel[grid](
        grad_y,
        codes,
        scales,
        table,
        downs.grad_s,
        downs.a,
        grad_x,
        downs.seed,
        m,
        n,
        k,
        block,
        *grad_y.stride(),
        *downs.strides(),
        *downs.masks(),
        **downs.constants(),
        NF4=nf4,
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
