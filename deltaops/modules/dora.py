"""DoRA's magnitudes: each row of the adapted weight has a length of its own that is trained.

    g = m / ‖W + s B A‖,    y = g ⊙ (x Wᵀ + s · drop(x) Aᵀ Bᵀ) + b

W + s B A [N, K] is never formed: with its rows w + s b A,

    ‖w + s b A‖² = ‖w‖² + 2 s ⟨w Aᵀ, b⟩ + s² b (A Aᵀ) bᵀ

which costs one product of W by r columns. No gradient goes through the norm, as in the paper.
A row of zeros has no length to scale, and stays what it is.
Source: Liu et al. 2024 (arXiv 2402.09353), eq. 5 and §4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draws import no_autocast


class Magnitude(nn.Module):
    """m ``[N]``, held where PEFT holds it: ``lora_magnitude_vector.default.weight``."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        """Hold ``weight`` ``[N]`` as a trainable parameter."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def extra_repr(self) -> str:
        """Size and dtype."""
        return f"{len(self.weight)}, {str(self.weight.dtype).removeprefix('torch.')}"


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``‖W + s B A‖`` of each row ``[N]``, in float32 at least.

    Args:
        weight: W ``[N, K]``; the product with A is taken in its dtype.
        a: ``[R, K]``.
        b: ``[N, R]``.
        scaling: s.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    with no_autocast(weight.device):
        own = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
        up = b.to(exact) * scaling
        mixed = ((weight @ a.to(weight.dtype).T).to(exact) * up).sum(1)
        inner = a.to(exact)
        added = ((up @ (inner @ inner.T)) * up).sum(1)
        norms: Tensor = (own + 2.0 * mixed + added).clamp_min(0.0).sqrt()
    return norms


def nonzero(norms: Tensor) -> Tensor:
    """``norms`` to divide by: one for a row of zeros, whose magnitude then counts for nothing."""
    return norms.masked_fill(norms == 0.0, 1.0)


def scaled(y: Tensor, bias: Tensor | None, magnitude: Tensor, norms: Tensor) -> Tensor:
    """``g ⊙ (y − b) + b`` for the op's y ``[..., N]``, which holds b already; rounded once."""
    g = magnitude / nonzero(norms)
    out = y * g
    if bias is not None:
        out = out + bias * (1.0 - g)
    return out.to(y.dtype)
