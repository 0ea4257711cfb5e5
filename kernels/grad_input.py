"""Input gradient     dx = Σⱼ mask_j ⊙ (dS_j A_j) + Σᵢ dy_i W_i

    dS [M,ΣR] fp32 (with s_j)  A_j [R_j,K]  dy_i [M,N_i]  W_i [N_i,K]  dx [M,K]
    mask_j is 0 or 1/(1-p_j), made again from the seed of its layer; see dropout.py. i counts the
    layers of one x, mostly one; j the branches of all of them.

The rank segment comes first (segments.py): its accumulator is what dy W then starts from, so no
second one is alive in the long loop, which runs over the rows of all W as if they were one matrix.
dx is rounded once. Traffic beyond the frozen layers' dx: dS and A, 4·M·R + R·K elements. Without
the base segment the kernel writes the rank part alone for cuBLAS to add dy W on: the backend's plan
"split". The same with tensor descriptors, for sm_90 and later: persistent_grad_input.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .dropout import drop_threshold, each_threshold, keep_scale
from .precision import Precision
from .segments import masked_downs
from .tiles import add_product, grouped_tile, load_tile, store_tile


@triton.jit
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
    stream,
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
    acc = masked_downs(
        grad_s, a, seed, row, tile_k * BLOCK_K, M, K, gs_row, a_row, a_col, stream, threshold,
        scale, RANKS, DROPOUT, WORK, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if HAS_BASE:
        for i in tl.static_range(len(N)):
            for n in range(0, N[i], BLOCK_N):
                inner = n + tl.arange(0, BLOCK_N)
                dy = load_tile(grad_y[i], row, inner, gy_row[i], gy_col[i], M, N[i])
                frozen = load_tile(weight[i], inner, col, w_row[i], w_col[i], N[i], K)
                acc = add_product(acc, dy, frozen)
    store_tile(grad_x, row, col, gx_row, 1, M, K, acc)


@dataclass(frozen=True)
class Downs:
    """The rank part of dx, as the kernels take it; an entry a branch, or as said."""

    grad_s: Tensor
    """``[M, ΣR]``."""
    a: tuple[Tensor, ...]
    seed: tuple[Tensor | None, ...]
    stream: tuple[int, ...]
    threshold: tuple[int, ...]

    @classmethod
    def of(
        cls,
        grad_s: Tensor,
        a: Sequence[Tensor],
        dropout: Sequence[float],
        seed: Sequence[Tensor | None],
        stream: Sequence[int],
    ) -> Downs:
        """From probabilities."""
        thresholds = tuple(drop_threshold(p) for p in dropout)
        return cls(grad_s, tuple(a), tuple(seed), tuple(stream), thresholds)

    @classmethod
    def of_layer(
        cls, grad_s: Tensor, a: Sequence[Tensor], dropout: Sequence[float], seed: Tensor | None
    ) -> Downs:
        """Of the branches of one layer."""
        return cls.of(grad_s, a, dropout, [seed] * len(a), range(len(a)))

    def strides(self) -> tuple[Any, ...]:
        """Of grad_s and of a."""
        rows, cols = tuple(t.stride(0) for t in self.a), tuple(t.stride(1) for t in self.a)
        return self.grad_s.stride(0), rows, cols

    def masks(self) -> tuple[Any, ...]:
        """Streams, thresholds and factors of what is kept."""
        scales = tuple(keep_scale(t) for t in self.threshold)
        return self.stream, each_threshold(self.threshold), scales

    def constants(self) -> dict[str, Any]:
        """What is known when a kernel is compiled."""
        ranks, masked = tuple(t.shape[0] for t in self.a), tuple(t > 0 for t in self.threshold)
        return {"RANKS": ranks, "DROPOUT": masked}


def grad_input_gemm(
    grad_y: Tensor,
    weight: Tensor,
    downs: Downs,
    grad_x: Tensor,
    *,
    precision: Precision,
    capability: int,
    has_base: bool = True,
) -> None:
    """Write ``grad_x [M, K]`` of one layer; without ``dy W`` where not ``has_base``."""
    plain = configs.is_plain(grad_y, weight, [t.shape[0] for t in downs.a])
    wide = precision.wide
    config = configs.grad_input(grad_y.shape[0], grad_y.dtype, capability, wide, plain)
    launch_grad_input([grad_y], [weight], downs, grad_x, precision, config, has_base)


def launch_grad_input(
    grad_y: Sequence[Tensor],
    weight: Sequence[Tensor],
    downs: Downs,
    grad_x: Tensor,
    precision: Precision,
    config: configs.Gemm,
    has_base: bool,
) -> None:
    """Write ``grad_x [M, K]`` of all layers."""
    m, k = grad_x.shape
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(k, config.cols),)
    _grad_input_kernel[grid](
        tuple(grad_y),
        tuple(weight),
        downs.grad_s,
        downs.a,
        grad_x,
        downs.seed,
        m,
        tuple(w.shape[0] for w in weight),
        k,
        tuple(dy.stride(0) for dy in grad_y),
        tuple(dy.stride(1) for dy in grad_y),
        tuple(w.stride(0) for w in weight),
        tuple(w.stride(1) for w in weight),
        *downs.strides(),
        grad_x.stride(0),
        *downs.masks(),
        **downs.constants(),
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
