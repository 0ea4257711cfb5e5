"""Between the two products of a parallel adapter     (He et al. 2021, arXiv 2110.04366, table 1)

    H = P + a,  U = s φ(H)          dH = dU ⊙ φ'(H)          P = drop(x) Aᵀ,  dU = s · dy B

    P, H, U, dU, dH [M,R] fp32; a [R]

project.py leaves P where H is wanted and dU where dH is, and both are replaced in their places. U
is to the products with B what S is in a branch without φ, so every way to compute them takes it;
the backward pass makes it again from H beside dH, for dB = dyᵀ U. A launch each way. Traffic: 8·M·R
bytes forward (12 with a) and 12 backward (16 with dB), beside 2·M·K of x in a half type.
Where a batch mixes adapters all of them are 0 in the rows of the others: φ(0) is 0.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate, activate_slope
from .tiles import is_own, load_tile, store_tile


@triton.jit(do_not_specialize=["number"])
def _hidden_kernel(
    h,
    bias,
    u,
    M,
    R,
    h_row,
    u_row,
    scale,
    shift,
    adapter,
    number,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    value = load_tile(h, row, lane, h_row, 1, M, R)
    if HAS_BIAS:
        value += tl.load(bias + lane, mask=lane < R, other=0.0).to(tl.float32)[None, :] * shift
        if ROUTED:
            value = tl.where(is_own(adapter, row, M, number)[:, None], value, 0.0)
        store_tile(h, row, lane, h_row, 1, M, R, value)
    store_tile(u, row, lane, u_row, 1, M, R, activate(value, ACTIVATION) * scale)


def hidden(
    h: Tensor,
    bias: Tensor | None,
    u: Tensor,
    *,
    activation: str,
    scaling: float,
    adapter: Tensor | None = None,
    number: int = 0,
) -> None:
    """Add ``bias [R]`` to ``h [M, R]`` in its place, in the rows where ``adapter`` (int32 ``[M]``)
    is ``number`` if it is given, and write ``u [M, R]``. Both fp32; their rows may be strided.
    Where φ is the identity ``h`` comes and stays with s in it, and u is the same."""
    m, rank = h.shape
    config, linear = configs.hidden(rank), activation == "identity"
    _hidden_kernel[(triton.cdiv(m, config.rows), triton.cdiv(rank, config.cols))](
        h,
        bias,
        u,
        m,
        rank,
        h.stride(0),
        u.stride(0),
        1.0 if linear else scaling,
        scaling if linear else 1.0,
        adapter,
        number,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        ROUTED=adapter is not None,
        BLOCK_M=config.rows,
        BLOCK_R=config.cols,
        num_warps=config.warps,
    )


@triton.jit
def _hidden_grad_kernel(
    h,
    grad_u,
    u,
    M,
    R,
    h_row,
    gu_row,
    u_row,
    scale,
    ACTIVATION: tl.constexpr,
    WANT_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    value = load_tile(h, row, lane, h_row, 1, M, R)
    grad = load_tile(grad_u, row, lane, gu_row, 1, M, R)
    store_tile(grad_u, row, lane, gu_row, 1, M, R, grad * activate_slope(value, ACTIVATION))
    if WANT_U:
        store_tile(u, row, lane, u_row, 1, M, R, activate(value, ACTIVATION) * scale)


def hidden_grads(
    h: Tensor, grad_u: Tensor, u: Tensor | None, *, activation: str, scaling: float
) -> None:
    """Make dH of ``grad_u [M, R]`` in its place, and write ``u [M, R]`` where it is given. All
    fp32; their rows may be strided."""
    m, rank = h.shape
    config = configs.hidden(rank)
    target = grad_u if u is None else u
    _hidden_grad_kernel[(triton.cdiv(m, config.rows), triton.cdiv(rank, config.cols))](
        h,
        grad_u,
        target,
        m,
        rank,
        h.stride(0),
        grad_u.stride(0),
        target.stride(0),
        scaling,
        ACTIVATION=activation,
        WANT_U=u is not None,
        BLOCK_M=config.rows,
        BLOCK_R=config.cols,
        num_warps=config.warps,
    )
