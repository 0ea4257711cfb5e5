"""The product in the middle of a gated MLP   (Dauphin et al. 2017; Shazeer 2020)

    y = φ(gate) · up,    dgate = dy · up · φ'(gate),    dup = dy · φ(gate)

Without up it is the activation alone, y = φ(gate). gate, up, y [M,K]; φ is silu in Llama's SwiGLU,
gelu in GEGLU. Element by element, nothing else is kept. Computed in float32 at least and rounded
once: eager torch rounds φ(gate) too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import activate, activate_slope


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``y [M, K]`` in the dtype of ``gate``."""
    work = torch.promote_types(gate.dtype, torch.float32)
    y = activate(activation, gate.to(work))
    y = (y if up is None else y * up.to(work)).to(gate.dtype)
    return y.clone() if y is gate else y  # the identity alone


def backward(
    grad_y: Tensor, gate: Tensor, up: Tensor | None, activation: str, needs: Sequence[bool]
) -> list[Tensor]:
    """The wanted ones of ``[grad_gate, grad_up]``, in the dtype of ``gate``.

    ``up`` may be None when only ``grad_up`` is wanted, or where there was none.
    """
    work = torch.promote_types(gate.dtype, torch.float32)
    grad, h = grad_y.to(work), gate.to(work)
    grads = []
    if needs[0]:
        if up is None and needs[1]:
            raise ValueError("grad_gate needs up")
        scaled = grad if up is None else grad * up.to(work)
        grads.append((scaled * activate_slope(activation, h)).to(gate.dtype))
    if needs[1]:
        grads.append((grad * activate(activation, h)).to(gate.dtype))
    return grads
