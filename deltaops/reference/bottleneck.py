"""Sequential adapter      (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, 2005.00247)

    h = norm(x) Downᵀ + down_bias,    y = residual + s · φ(h) Upᵀ + up_bias

x [M,K]  Down [R,K]  Up [K,R]  y [M,K]; h [M,R] and the norm's stats [M,2] are kept for backward.
Computed in the wider of the parameters' dtype and that of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .activation import activate, activate_slope
from .norm_bias import affine, grad_input, normalized, statistics


def _optional(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def forward(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scaling: float,
    eps: float,
    activation: str,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y [M, K] in x's dtype, h [M, R], stats [M, 2])``; norm "none" has stats ``[0, 2]``."""
    state = torch.promote_types(x.dtype, torch.float32)
    work = torch.promote_types(x.dtype, down.dtype)
    stats = x.new_empty(0, 2, dtype=state) if norm == "none" else statistics(x, norm, eps)
    z = x if norm == "none" else affine(normalized(x, stats), gamma, beta)
    h = linear(z.to(work), down.to(work), _optional(down_bias, work))
    y = scaling * activate(activation, h) @ up.to(work).T
    if up_bias is not None:
        y = y + up_bias.to(work)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype), h.to(state), stats


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    h: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    activation: str,
    norm: str,
    residual_is_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted ones of x, gamma, beta, down, down_bias, up, up_bias, in that order.

    ``x`` may be None without a norm when no gradient of ``down`` is wanted.
    """
    need_x, need_gamma, need_beta, need_down, need_down_bias, need_up, need_up_bias = needs
    work = torch.promote_types(grad_y.dtype, down.dtype)
    dy, inner = grad_y.to(work), h.to(work)
    dh = scaling * (dy @ up.to(work)) * activate_slope(activation, inner)
    dz = dh @ down.to(work)
    if need_down or (norm != "none" and (need_x or need_gamma)):
        if x is None:
            raise ValueError("the gradient of down, and any past a norm, needs x")
        n = x if norm == "none" else normalized(x, stats)
    grads = []
    if need_x:
        wide = dz.to(stats.dtype)
        dx = wide if norm == "none" else grad_input(affine(wide, gamma, None), n, stats, norm)
        grads.append((dx + grad_y if residual_is_x else dx).to(grad_y.dtype))
    if need_gamma and gamma is not None:
        grads.append((dz.to(stats.dtype) * n).sum(0).to(gamma.dtype))
    if need_beta and beta is not None:
        grads.append(dz.sum(0).to(beta.dtype))
    if need_down:
        z = n if norm == "none" else affine(n, gamma, beta)
        grads.append((dh.T @ z.to(work)).to(down.dtype))
    if need_down_bias:
        grads.append(dh.sum(0).to(down.dtype))
    if need_up:
        grads.append((dy.T @ (scaling * activate(activation, inner))).to(up.dtype))
    if need_up_bias:
        grads.append(dy.sum(0).to(up.dtype))
    return grads
