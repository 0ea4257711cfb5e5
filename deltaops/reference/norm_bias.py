"""LayerNorm or RMSNorm with its bias   (Ba et al. 2016; Zhang et al. 2019; Ben Zaken et al. 2021)

    n = (x − mean) · rstd,    y = n · gamma + bias          RMSNorm: mean = 0
                                                            "none": n = x   ((IA)³: Liu et al. 2022)

x [M,K]  gamma [K]  bias [K]  y [M,K];  stats [M,2] holds mean and rstd = 1/√(E(x − mean)² + eps);
it is [0,2] without a norm.
Computed in float32 at least and rounded once, as torch's own norms are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORMS = ("layer", "rms")
"""The names that the ops take."""


def statistics(x: Tensor, norm: str, eps: float) -> Tensor:
    """``[M, 2]``: mean and 1/std of each row, float32 (float64 for float64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "none":
        return x.new_empty(0, 2)
    mean = x.mean(-1, keepdim=True) if norm == "layer" else torch.zeros_like(x[:, :1])
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return torch.cat([mean, rstd], dim=1)


def normalized(x: Tensor, stats: Tensor) -> Tensor:
    """``(x − mean) · rstd`` in the dtype of ``stats``; x itself where those are of no rows."""
    if len(stats) < len(x):
        return x.to(stats.dtype)
    return (x.to(stats.dtype) - stats[:, :1]) * stats[:, 1:]


def affine(n: Tensor, gamma: Tensor | None, bias: Tensor | None) -> Tensor:
    """``n · gamma + bias``; what is None is left out."""
    y = n if gamma is None else n * gamma.to(n.dtype)
    return y if bias is None else y + bias.to(n.dtype)


def grad_input(grad_n: Tensor, n: Tensor | None, stats: Tensor, norm: str) -> Tensor:
    """The gradient of x from that of n."""
    if norm == "none" or n is None:
        return grad_n
    centre = grad_n.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return stats[:, 1:] * (grad_n - centre - n * (grad_n * n).mean(-1, keepdim=True))


def forward(
    x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor]:
    """``(y [M, K] in x's dtype, stats [M, 2])``; norm "none" has stats ``[0, 2]``."""
    stats = statistics(x, norm, eps)
    return affine(normalized(x, stats), gamma, bias).to(x.dtype), stats


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
    norm: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted ones of ``[grad_x, grad_gamma, grad_bias]``, the last two in ``dtype``.

    ``x`` may be None when only ``grad_bias`` is wanted, or without a norm no ``grad_gamma``.
    """
    need_x, need_gamma, need_bias = needs
    grad = grad_y.to(stats.dtype)
    grads = []
    n = None
    if need_gamma or (need_x and norm != "none"):
        if x is None:
            raise ValueError("grad_gamma, and grad_x past a norm, need x")
        n = normalized(x, stats)
    if need_x:
        grads.append(grad_input(affine(grad, gamma, None), n, stats, norm).to(grad_y.dtype))
    if need_gamma:
        assert n is not None
        grads.append((grad * n).sum(0).to(dtype))
    if need_bias:
        grads.append(grad.sum(0).to(dtype))
    return grads
