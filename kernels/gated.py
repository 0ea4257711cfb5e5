"""The product in the middle of a gated MLP     (Dauphin et al. 2017; Shazeer 2020)

    y = φ(gate) · up,    dgate = dy · up · φ'(gate),    dup = dy · φ(gate)

    gate, up, y [M,K], any strides; computed in fp32, rounded once

Traffic: gate, up and y once forward; dy, gate, up and both gradients once backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate, activate_slope
from .tiles import load_tile, store_tile


@triton.jit
def _gated_kernel(
    gate,
    up,
    y,
    M,
    K,
    g_row,
    g_col,
    u_row,
    u_col,
    y_row,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    h = load_tile(gate, row, col, g_row, g_col, M, K).to(tl.float32)
    side = load_tile(up, row, col, u_row, u_col, M, K).to(tl.float32)
    store_tile(y, row, col, y_row, 1, M, K, activate(h, ACTIVATION) * side)


def gated(gate: Tensor, up: Tensor, y: Tensor, *, activation: str) -> None:
    """Write ``y [M, K]`` (contiguous)."""
    m, k = gate.shape
    config = configs.gated(k)
    _gated_kernel[(triton.cdiv(m, config.rows), triton.cdiv(k, config.cols))](
        gate,
        up,
        y,
        m,
        k,
        *gate.stride(),
        *up.stride(),
        y.stride(0),
        ACTIVATION=activation,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        num_warps=config.warps,
    )


@triton.jit
def _gated_grad_kernel(
    grad_y,
    gate,
    up,
    grad_gate,
    grad_up,
    M,
    K,
    gy_row,
    gy_col,
    g_row,
    g_col,
    u_row,
    u_col,
    WANT_GATE: tl.constexpr,
    WANT_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = load_tile(grad_y, row, col, gy_row, gy_col, M, K).to(tl.float32)
    h = load_tile(gate, row, col, g_row, g_col, M, K).to(tl.float32)
    if WANT_GATE:
        side = load_tile(up, row, col, u_row, u_col, M, K).to(tl.float32)
        out = grad * side * activate_slope(h, ACTIVATION)
        store_tile(grad_gate, row, col, K, 1, M, K, out)
    if WANT_UP:
        store_tile(grad_up, row, col, K, 1, M, K, grad * activate(h, ACTIVATION))


def gated_grads(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
) -> None:
    """Write those of the gradients ``[M, K]`` (contiguous) that are given; up may be None where
    grad_gate is."""
    m, k = gate.shape
    config = configs.gated(k)
    side = gate if up is None else up
    _gated_grad_kernel[(triton.cdiv(m, config.rows), triton.cdiv(k, config.cols))](
        grad_y,
        gate,
        side,
        grad_gate,
        grad_up,
        m,
        k,
        *grad_y.stride(),
        *gate.stride(),
        *side.stride(),
        WANT_GATE=grad_gate is not None,
        WANT_UP=grad_up is not None,
        ACTIVATION=activation,
        BLOCK_M=config.rows,
        BLOCK_K=config.cols,
        num_warps=config.warps,
    )
