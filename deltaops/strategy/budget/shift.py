"""The shift that makes an expected number of parameters equal a budget.

    pᵢ = σ((αᵢ − ζ) / τ),   ζ(α): Σ nᵢ pᵢ = B
    ∂pᵢ/∂αⱼ = pᵢ (1 − pᵢ) (δᵢⱼ − wⱼ) / τ,   wⱼ = nⱼ pⱼ (1 − pⱼ) / Σ n p (1 − p)

So places compete: one that gains takes from all others what it costs, and the sum stays.
Source: Hu et al. 2022 (S3Delta, arXiv 2206.07382); the derivative is that of the implicit ζ.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 200
"""More than float64 can tell apart."""


def shifted(alpha: Tensor, sizes: Tensor, budget: float, temperature: float) -> Tensor:
    """p ``[P]`` in float64, with Σ n p = ``budget`` to rounding.

    Args:
        alpha: ``[P]``.
        sizes: n ``[P]``, parameters.
        budget: B, above 0 and below Σ n.
        temperature: τ > 0.
    """
    # beyond these every p is nearly 1, or nearly 0: B / Σ n decides how nearly
    share = budget / float(sizes.sum())
    reach = temperature * abs(float(torch.logit(torch.tensor(share, dtype=torch.float64)))) + 1.0
    low, high = float(alpha.min()) - reach, float(alpha.max()) + reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if float((sizes * torch.sigmoid((alpha - middle) / temperature)).sum()) > budget:
            low = middle
        else:
            high = middle
    return torch.sigmoid((alpha - high) / temperature)


def through_shift(grad: Tensor, p: Tensor, sizes: Tensor, temperature: float) -> Tensor:
    """∂L/∂α from ``grad`` = ∂L/∂x with x = (α − ζ) / τ, all ``[P]``: ζ moves as well."""
    slopes = sizes * p * (1 - p)
    return (grad - slopes / slopes.sum() * grad.sum()) / temperature
