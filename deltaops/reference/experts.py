"""A mixture of experts with low-rank branches.      (Jiang et al. 2024, arXiv 2401.04088, §2.1;
                                                       LoRA: Hu et al. 2021, 2106.09685, eq. 3)

    y_t = Σⱼ p_tj · E_{i_tj}(x_t),    E_e(x) = D_e(φ(g) · u),    [g u] = G_e(x)
    G_e(x) = x W_eᵀ + s · (x A_eᵀ) B_eᵀ,    D_e alike with its own W, A, B

x [T,H]  i, p [T,J]: a token's J experts and their weights.  W of all experts' gates and ups
[E,2I,H], of their downs [E,H,I]; A [E,R,K] and B [E,N,R] beside a W [E,N,K].
Dense: every expert computes every token, and counts for those that chose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import activate

Branch = tuple[Tensor, Tensor, float]
"""A, B and s."""


def forward(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "silu",
    gate_up_branch: Branch | None = None,
    down_branch: Branch | None = None,
) -> Tensor:
    """y ``[T, H]`` in the dtype of ``x``."""
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        gate, up = _linear(x, gate_up, gate_up_branch, e).chunk(2, dim=-1)
        out = _linear(activate(activation, gate) * up, down, down_branch, e)
        y = y + out * (weights * (index == e)).sum(dim=1, keepdim=True)
    return y.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, branch: Branch | None, e: int) -> Tensor:
    y = x @ weight[e].T
    if branch is None:
        return y
    a, b, scaling = branch
    return y + scaling * (x @ a[e].T) @ b[e].T
