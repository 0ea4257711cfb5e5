"""dA and dB on the multiprocessors that a persistent dx leaves over   dA = dSᵀ x   dB = dyᵀ S

    x [M,K]  dS [M,R]  dA [R,K]        dy [M,N]  S [M,R]  dB [N,R]        (Hopper)

dA is a sum over the rows of x, which it reads once, limited by memory; dx is limited by its
products. A persistent GEMM of 1024 tiles takes 8 rounds on 132 multiprocessors, and 8 on 128: four
are free, and read x meanwhile. A program stays on one of them and takes every P-th block of
columns, of P programs, with all of its rows: no partial sums, and how many programs there are
changes no bits. A program needs more than half of a multiprocessor's shared memory, so that each
has one of its own, whichever of the two kernels begins first. Four read 80 GB a second each on an
H200: x [8192,4096] takes them about 0.6 of the time of dx of a layer of 4096 x 4096. dB, which is
dA's sum with other operands, has time there where layers are wider; the mask of x, which is to be
made or read for dA, never has.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .persistent import described
from .tiles import load_tile


@triton.jit
def _beside_kernel(
    x,
    grad_s,
    grad_a,
    M,
    K,
    R,
    gs_row,
    ga_row,
    ga_col,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_R)
    for block in range(tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.num_programs(0)):
        first = block * BLOCK_K
        acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
        for m in range(0, M, BLOCK_M):
            row = m + tl.arange(0, BLOCK_M)
            tile = x.load([m, first])
            side = load_tile(grad_s, row, lane, gs_row, 1, M, R).to(tile.dtype)
            acc = tl.dot(tile.T, side, acc)
        col = first + tl.arange(0, BLOCK_K)
        offset = col.to(tl.int64)[:, None] * ga_col + lane.to(tl.int64)[None, :] * ga_row
        inside = (col[:, None] < K) & (lane[None, :] < R)
        tl.store(grad_a + offset, acc.to(grad_a.dtype.element_ty), mask=inside)


def beside(grad_s: Tensor, x: Tensor, grad_a: Tensor, *, programs: int) -> None:
    """Write ``grad_a [R, K]``, of any strides, for ``grad_s [M, R]`` of x's dtype; x is such as
    ``persistent.is_describable`` takes, R at most 128."""
    (m, k), rank = x.shape, grad_a.shape[0]
    config = configs.beside(rank)
    _beside_kernel[(programs,)](
        described(x, config.rows, config.cols),
        grad_s,
        grad_a,
        m,
        k,
        rank,
        grad_s.stride(0),
        grad_a.stride(0),
        grad_a.stride(1),
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        BLOCK_R=config.rank,
        num_warps=config.warps,
        num_stages=config.stages,
    )
