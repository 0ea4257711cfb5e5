"""Linear layer with low-rank branches      (LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3)

    y = x Wᵀ + bias + Σᵢ sᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ

x [M,K]  W [N,K]  bias [N]  A [R,K]  B [N,R]  y [M,N];  S = sᵢ · dropᵢ(x) Aᵢᵀ side by side, [M, ΣR].
A branch is computed in the wider of its own dtype and that of x, as PEFT does with float32
adapters on a bfloat16 model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import dropout_scale


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """S is kept in float32 (float64 for float64)."""
    return torch.promote_types(dtype, torch.float32)


def _dropped(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    scale = dropout_scale(x, p, seed, stream)
    # where, not a product: a dropped NaN or infinity is gone, as in torch's own dropout
    return x if scale is None else torch.where(scale > 0, x * scale, torch.zeros_like(x))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(y [M, N] in x's dtype, S [M, ΣR])``."""
    y = torch.nn.functional.linear(x, weight, bias)
    projected = []
    for i in range(len(a)):
        work = torch.promote_types(x.dtype, a[i].dtype)
        s = scaling[i] * (_dropped(x, dropout[i], seed, i).to(work) @ a[i].to(work).T)
        y = y + s @ b[i].to(work).T
        projected.append(s.to(state_dtype(x.dtype)))
    empty = x.new_empty(x.shape[0], 0, dtype=state_dtype(x.dtype))
    return y.to(x.dtype), torch.cat(projected, dim=1) if projected else empty


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted ones of ``[grad_x, grad_bias, grad_a…, grad_b…]``, in that order.

    ``needs`` has 2 + 2·branches flags. ``x`` may be None when no ``grad_a`` is wanted.
    """
    branches = len(a)
    need_x, need_bias = needs[0], needs[1]
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    grad_x = grad_y @ weight if need_x else None
    column = 0
    for i in range(branches):
        work = torch.promote_types(grad_y.dtype, a[i].dtype)
        dy, rank = grad_y.to(work), a[i].shape[0]
        s_i = s[:, column : column + rank]
        column += rank
        if needs[2 + branches + i]:
            grads_b.append((dy.T @ s_i.to(work)).to(b[i].dtype))
        if not (need_x or needs[2 + i]):
            continue
        ds = scaling[i] * (dy @ b[i].to(work))
        if needs[2 + i]:
            if x is None:
                raise ValueError("grad_a needs x")
            grads_a.append((ds.T @ _dropped(x, dropout[i], seed, i).to(work)).to(a[i].dtype))
        if grad_x is not None:
            grad_x = grad_x + _dropped(ds @ a[i].to(work), dropout[i], seed, i)
    grads = [] if grad_x is None else [grad_x.to(grad_y.dtype)]
    if need_bias:
        grads.append(grad_y.sum(0))
    return grads + grads_a + grads_b
