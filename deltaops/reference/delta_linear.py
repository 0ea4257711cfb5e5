"""Linear layer with low-rank branches      (LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3;
                                         parallel adapter: He et al. 2021, arXiv 2110.04366)

    y = x Wᵀ + bias + Σᵢ sᵢ · φᵢ(Hᵢ) Bᵢᵀ,    Hᵢ = dropᵢ(x) Aᵢᵀ + aᵢ

x [M,K]  W [N,K]  bias [N]  A [R,K]  a [R] or none  B [N,R]  y [M,N].
S [M, ΣR] is what backward needs, branches side by side: sᵢ·Hᵢ where φ is the identity, else Hᵢ,
from which φ(H) and φ'(H) are computed again.
A branch is computed in the wider of its own dtype and that of x, as PEFT does with float32
adapters on a bfloat16 model.
Where a batch mixes adapters, row m has the branch adapter[m] instead of the sum, or none for −1:
Hᵢ, S and the gradients through them are 0 in the rows that are not branch i's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import activate, activate_slope
from .philox import dropout_scale


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """S is kept in float32 (float64 for float64)."""
    return torch.promote_types(dtype, torch.float32)


def _dropped(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    scale = dropout_scale(x, p, seed, stream)
    # where, not a product: a dropped NaN or infinity is gone, as in torch's own dropout
    return x if scale is None else torch.where(scale > 0, x * scale, torch.zeros_like(x))


def _rows_of(adapter: Tensor | None, i: int) -> Tensor | None:
    """``[M, 1]``: whether a row has branch i; None where all rows have all."""
    return None if adapter is None else (adapter == i).unsqueeze(1)


def _only(rows: Tensor | None, t: Tensor) -> Tensor:
    # where, not a product: what others leave in these rows may be NaN
    return t if rows is None else torch.where(rows, t, torch.zeros_like(t))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    adapter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [M, N] in x's dtype, S [M, ΣR])``; ``adapter`` ``[M]`` or None, for all branches."""
    y = torch.nn.functional.linear(x, weight, bias)
    projected = []
    for i in range(len(a)):
        work = torch.promote_types(x.dtype, a[i].dtype)
        h = _dropped(x, dropout[i], seed, i).to(work) @ a[i].to(work).T
        bias_i, rows = branch_bias[i], _rows_of(adapter, i)
        if bias_i is not None:
            h = h + bias_i.to(work)
        h = _only(rows, h)
        s = scaling[i] * activate(activation[i], h)
        y = y + _only(rows, s @ b[i].to(work).T)
        projected.append((s if activation[i] == "identity" else h).to(state_dtype(x.dtype)))
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
    activation: Sequence[str],
    seed: Tensor | None,
    needs: Sequence[bool],
    adapter: Tensor | None = None,
) -> list[Tensor]:
    """The wanted ones of ``[grad_x, grad_bias, grad_a…, grad_b…, grad_branch_bias…]``.

    ``needs`` has 2 + 3·branches flags. ``x`` may be None when no ``grad_a`` is wanted.
    """
    branches = len(a)
    need_x, need_bias = needs[0], needs[1]
    need_a, need_b, need_branch_bias = (
        needs[2 + j * branches : 2 + (j + 1) * branches] for j in range(3)
    )
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    grads_branch_bias: list[Tensor] = []
    grad_x = grad_y @ weight if need_x else None
    column = 0
    for i in range(branches):
        work = torch.promote_types(grad_y.dtype, a[i].dtype)
        rows = _rows_of(adapter, i)
        dy, rank = _only(rows, grad_y.to(work)), a[i].shape[0]
        s_i = s[:, column : column + rank]
        column += rank
        linear = activation[i] == "identity"
        if need_b[i]:
            up = s_i if linear else scaling[i] * activate(activation[i], s_i)
            grads_b.append((dy.T @ up.to(work)).to(b[i].dtype))
        if not (need_x or need_a[i] or need_branch_bias[i]):
            continue
        dh = scaling[i] * (dy @ b[i].to(work))
        if not linear:
            dh = dh * activate_slope(activation[i], s_i).to(work)
        if need_a[i]:
            if x is None:
                raise ValueError("grad_a needs x")
            dropped = _only(rows, _dropped(x, dropout[i], seed, i).to(work))
            grads_a.append((dh.T @ dropped).to(a[i].dtype))
        if need_branch_bias[i]:
            grads_branch_bias.append(dh.sum(0).to(a[i].dtype))
        if grad_x is not None:
            grad_x = grad_x + _only(rows, _dropped(dh @ a[i].to(work), dropout[i], seed, i))
    grads = [] if grad_x is None else [grad_x.to(grad_y.dtype)]
    if need_bias:
        grads.append(grad_y.sum(0))
    return grads + grads_a + grads_b + grads_branch_bias
