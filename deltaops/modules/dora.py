"""DoRA's magnitudes: each row of the adapted weight has a length of its own that is trained.

    g = m / ‖W + s B A‖,    y = g ⊙ (x Wᵀ + s · drop(x) Aᵀ Bᵀ) + b

W + s B A [N, K] is never formed: see :mod:`deltaops.ops.dora_norm`. No gradient goes through the
norm, as in the paper.
A row of zeros has no length to scale, and stays what it is.
Source: Liu et al. 2024 (arXiv 2402.09353), eq. 5 and §4.3.
"""

from __future__ import annotations

from torch import Tensor, nn

from deltaops.ops import dora_norm


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


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """:func:`deltaops.ops.dora_norm`, by whichever backend is first: it stands beside a place's op,
    and a place that insists on its backend insists on that op."""
    return dora_norm(weight, a, b, scaling)


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
