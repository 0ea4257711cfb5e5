"""Lengths of the rows of an adapted weight     (DoRA: Liu et al. 2024, arXiv 2402.09353, eq. 5)

    ‖w + s b A‖² = ‖w‖² + 2 s ⟨w Aᵀ, b⟩ + s² b (A Aᵀ) bᵀ        w, b: a row of W, of B

W [N,K]  A [R,K]  B [N,R]  norms [N]. W + s B A [N,K] is never formed: that costs one product of W
by r columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``norms [N]`` in float32 at least; the product with A is taken in the dtype of ``weight``."""
    exact = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
    up = b.to(exact) * scaling
    mixed = ((weight @ a.to(weight.dtype).T).to(exact) * up).sum(1)
    inner = a.to(exact)
    added = ((up @ (inner @ inner.T)) * up).sum(1)
    norms: Tensor = (own + 2.0 * mixed + added).clamp_min(0.0).sqrt()
    return norms
