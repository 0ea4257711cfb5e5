"""The branches of a ``delta_linear`` apart from its two GEMMs: S, and what dy gives of them.

    S = s · drop(x) Aᵀ     or, of a parallel adapter,     H = drop(x) Aᵀ + a,  U = s · φ(H)

S and H are kept for the backward pass; y's GEMM contracts S or U with B. On the current GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import core

LINEAR = "identity"


def project(
    x: Tensor,
    a: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    adapter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What is kept ``[M, ΣR]``, and what goes on to B; x ``[M, K]`` has rows."""
    precision = core.kernels("precision").rank_precision(x.dtype, a)
    s: Tensor = core.kernels("project").project_branches(
        x, list(a), project_scaling(scaling, activation), list(dropout), seed, precision, adapter
    )
    return s, activate(s, a, branch_bias, scaling, activation, adapter)


def project_scaling(scaling: Sequence[float], activation: Sequence[str]) -> list[float]:
    """By what drop(x) Aᵀ is multiplied: H has no s, which comes after φ."""
    pairs = zip(scaling, activation, strict=True)
    return [s if kind == LINEAR else 1.0 for s, kind in pairs]


def activate(
    s: Tensor,
    a: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    activation: Sequence[str],
    adapter: Tensor | None,
) -> Tensor:
    """What goes on to B: ``s`` itself, or, where some branch has a bias or an activation, memory of
    its own beside ``s``, which gets the biases."""
    if all(kind == LINEAR for kind in activation) and all(t is None for t in branch_bias):
        return s
    u = torch.empty(s.shape, dtype=torch.float32, device=s.device)
    for i, piece in enumerate(columns([t.shape[0] for t in a])):
        bias = branch_bias[i]
        core.kernels("hidden").hidden(
            s[:, piece],
            None if bias is None else bias.contiguous(),
            u[:, piece],
            activation=activation[i],
            scaling=scaling[i],
            adapter=adapter,
            number=i,
        )
    return u


def pass_over_dy(
    grad_y: Tensor,
    b: Tensor,
    s: Tensor,
    *,
    scaling: float,
    activation: str,
    precision: Any,  # deltaops.kernels.precision.Precision
    grad_s: Tensor | None,
    grad_b: Tensor | None,
    grad_bias: Tensor | None,
    adapter: Tensor | None = None,
    number: int = 0,
    postponed: list[tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write those of dS (of a parallel adapter dH), dB and db of a branch that are given: in one
    pass, or dS in its own. With ``adapter`` dS is zero in the rows where it is not ``number``. The
    last sums of dB and db are left to ``postponed`` where it is given (kernels/reduce.py)."""
    beside, linear = grad_b is not None or grad_bias is not None, activation == LINEAR
    made: Tensor | None = None
    if grad_s is not None and (
        not beside
        or not linear  # φ' is of the whole sum
        or core.kernels("configs").reads_dy_twice(grad_y, b, precision.wide)
    ):
        core.kernels("project").project(
            grad_y, b.t(), grad_s,
            scaling=scaling, precision=precision, adapter=adapter, number=number,
        )  # fmt: skip
        made, grad_s = grad_s, None
    if not linear:
        s = _through_activation(s, made, grad_b is not None, activation, scaling)
    if grad_s is not None or beside:
        core.kernels("grad_up").grad_up(
            grad_y,
            b,
            s,
            scaling=scaling,
            precision=precision,
            grad_s=grad_s,
            grad_b=grad_b,
            grad_bias=grad_bias,
            adapter=adapter,
            number=number,
            postponed=postponed,
            capability=core.capability(grad_y),
        )


def _through_activation(
    h: Tensor, grad_u: Tensor | None, want_u: bool, activation: str, scaling: float
) -> Tensor:
    """Make dH of dU in its place, where that is given. Returns U where it is wanted, else ``h``."""
    u = torch.empty(h.shape, dtype=h.dtype, device=h.device) if want_u else None
    settings = {"activation": activation, "scaling": scaling}
    if grad_u is not None:
        core.kernels("hidden").hidden_grads(h, grad_u, u, **settings)
    elif u is not None:
        core.kernels("hidden").hidden(h, None, u, **settings)
    return h if u is None else u


def wanted(
    a: Sequence[Tensor], b: Sequence[Tensor], needs: Sequence[bool], device: torch.device
) -> list[Tensor | None]:
    """Memory of dA…, dB…, da…, as ``needs`` says of each."""
    shapes = [*((t.shape, t.dtype) for t in (*a, *b)), *((t.shape[:1], t.dtype) for t in a)]
    return [
        torch.empty(shape, dtype=dtype, device=device) if need else None
        for (shape, dtype), need in zip(shapes, needs, strict=True)
    ]


def columns(widths: Sequence[int]) -> list[slice]:
    """Of pieces side by side."""
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
