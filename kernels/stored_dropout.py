"""LoRA with a stored mask, for the baseline in deltaops/measure/published.py; no op uses it.

    x̂ = mask ⊙ x,   S = s · x̂ Aᵀ                 in one reading of x
    dx = mask ⊙ (dS A) + dy W                     in one accumulator

    x, x̂ [M,K]  keep [M,K] uint8  A [R,K]  S, dS [M,R] fp32  dy [M,N]  W [N,K]  dx [M,K]

The plan of LoRAFusion (Zhu et al. 2025, arXiv 2510.00206, §5): what dropout leaves and which it was
are kept for the backward pass. Traffic beyond kernels that make the mask again: x̂ written here and
read for dA, 2·M·K elements; the mask written here and read for dx, 2·M·K bytes.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, keep_mask, keep_scale
from .precision import Precision
from .tiles import grouped_tile, load_tile, store_tile


@triton.jit(do_not_specialize=["threshold"])
def _drop_and_project_kernel(
    x,
    a,
    dropped,
    keep,
    s,
    seed,
    M,
    K,
    R,
    x_row,
    a_row,
    s_row,
    scale,
    threshold,
    keep_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    last = tl.where(tl.program_id(1) == 0, M, 0)  # one program of a row tile stores it
    key = tl.load(seed)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        mask = keep_mask(key, row, k, 0, threshold, BLOCK_M, BLOCK_K)
        tile = load_tile(x, row, col, x_row, 1, M, K).to(tl.float32)
        tile = tl.where(mask, tile * keep_factor, 0.0).to(x.dtype.element_ty)
        store_tile(dropped, row, col, K, 1, last, K, tile)
        store_tile(keep, row, col, K, 1, last, K, mask)
        down = load_tile(a, lane, col, a_row, 1, R, K)
        acc = tl.dot(tile, tl.trans(down), acc, input_precision="ieee")
    store_tile(s, row, lane, s_row, 1, M, R, acc * scale)


def drop_and_project(
    x: Tensor, a: Tensor, s: Tensor, *, scaling: float, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(x̂, keep), and ``s [M, R]`` is written. Rows of x and a lie side by side; one dtype."""
    (m, k), rank = x.shape, a.shape[0]
    config = configs.project(m, rank, x.dtype == torch.float32, configs.is_aligned(x, a))
    if config.rank > 64:  # by four warps 128 lanes and a mask spill
        config = configs.for_amd(replace(config, warps=8))
    threshold = drop_threshold(dropout)
    dropped = torch.empty((m, k), dtype=x.dtype, device=x.device)
    keep = torch.empty((m, k), dtype=torch.uint8, device=x.device)
    _drop_and_project_kernel[(triton.cdiv(m, config.rows), triton.cdiv(rank, config.rank))](
        x,
        a,
        dropped,
        keep,
        s,
        seed,
        m,
        k,
        rank,
        x.stride(0),
        a.stride(0),
        s.stride(0),
        scaling,
        threshold,
        keep_scale(threshold),
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dropped, keep


@triton.jit
def _stored_grad_input_kernel(
    grad_y,
    weight,
    grad_s,
    a,
    keep,
    grad_x,
    M,
    N,
    K,
    R,
    gy_row,
    w_row,
    gs_row,
    a_row,
    keep_factor,
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
    for r in range(0, R, BLOCK_R):
        lane = r + tl.arange(0, BLOCK_R)
        side = load_tile(grad_s, row, lane, gs_row, 1, M, R).to(a.dtype.element_ty)
        down = load_tile(a, lane, col, a_row, 1, R, K)
        acc = tl.dot(side, down, acc, input_precision="ieee")
    kept = load_tile(keep, row, col, K, 1, M, K) != 0
    acc = tl.where(kept, acc * keep_factor, 0.0)
    for n in range(0, N, BLOCK_N):
        inner = n + tl.arange(0, BLOCK_N)
        dy = load_tile(grad_y, row, inner, gy_row, 1, M, N)
        frozen = load_tile(weight, inner, col, w_row, 1, N, K)
        acc = tl.dot(dy, frozen, acc, input_precision="ieee")
    store_tile(grad_x, row, col, K, 1, M, K, acc)


def stored_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: Tensor,
    keep: Tensor,
    *,
    dropout: float,
    precision: Precision,
    capability: int,
) -> Tensor:
    """dx ``[M, K]``. Rows of every matrix lie side by side; one dtype but grad_s's."""
    (m, n), (rank, k) = grad_y.shape, a.shape
    plain = configs.is_plain(grad_y, weight, [rank])
    config = configs.grad_input(m, grad_y.dtype, capability, precision.wide, plain)
    grad_x = torch.empty((m, k), dtype=grad_y.dtype, device=grad_y.device)
    _stored_grad_input_kernel[(triton.cdiv(m, config.rows) * triton.cdiv(k, config.cols),)](
        grad_y,
        weight,
        grad_s,
        a,
        keep,
        grad_x,
        m,
        n,
        k,
        rank,
        grad_y.stride(0),
        weight.stride(0),
        grad_s.stride(0),
        a.stride(0),
        keep_scale(drop_threshold(dropout)),
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_N=config.inner,
        BLOCK_R=config.rank,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return grad_x
