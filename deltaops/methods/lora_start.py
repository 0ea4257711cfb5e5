"""Start values of LoRA that are taken out of the weight.      W = (W − s·B A) + s·B A

A and B begin as the part of W that weighs most, and what stays frozen is the rest: the model
computes what it computed, and training moves the directions that matter first.

    PiSSA   W = U Σ Vᵀ:  B = U_r √(Σ_r / s),  A = √(Σ_r / s) V_rᵀ
    OLoRA   W = Q R:     B = Q_r,  A = R_r

Source: Meng et al. 2024 (arXiv 2404.02948), §3; Büyükakyüz 2024 (2406.01775), algorithm 1;
``pissa_niter_N`` by Halko et al. 2011 (0909.4061), algorithm 4.4.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from deltaops.errors import AttachError
from deltaops.modules import Start, draws_on
from deltaops.ops.paths import no_autocast

_OVERSAMPLED = 8
"""Columns beyond r in the sketch of W; Halko et al. find 5 to 10 enough."""


def is_taken_out(start: object) -> bool:
    """Whether ``init_lora_weights`` is one of this file's."""
    return isinstance(start, str) and re.fullmatch(r"olora|pissa(_niter_\d+)?", start) is not None


def is_drawn(start: object) -> bool:
    """Whether it depends on random numbers, so that no file can say what it was."""
    return isinstance(start, str) and start.startswith("pissa_niter_")


@torch.no_grad()
def taken_out(
    start: str,
    weight: Tensor,
    rank: int,
    scaling: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A ``[r, K]`` and B ``[N, r]`` of ``weight`` ``[N, K]``, in float32 at least.

    Args:
        start: one for which :func:`is_taken_out` holds.
        weight: W.
        rank: r ≤ min(N, K).
        scaling: s > 0.
        generator: draws the sketch; torch's global CPU generator without one.
    Raises: AttachError where W holds NaN or infinity.
    """
    n, k = weight.shape
    if weight.is_meta:
        return weight.new_empty(rank, k), weight.new_empty(n, rank)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(wide).all()):
        raise AttachError(
            f"attach: init_lora_weights={start!r} takes A and B out of weights, and one of them "
            "holds NaN or infinity. Load the base model again, or start with True."
        )
    if start == "olora":
        q, r = torch.linalg.qr(wide)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if start == "pissa":
        u, sigma, v = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, sigma, v = _sketched(wide, rank, int(start.rpartition("_")[2]), generator)
    root = (sigma[:rank] / scaling).sqrt()
    return root.unsqueeze(1) * v[:rank], u[:, :rank] * root


@torch.no_grad()
def rest(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``W − s·B A`` ``[N, K]`` in the dtype of W, rounded once."""
    exact = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    with no_autocast(weight.device):
        return (weight.to(exact) - scaling * (b.to(exact) @ a.to(exact))).to(weight.dtype)


@torch.no_grad()
def is_rest(left: Tensor, weight: Tensor, start: Start, scaling: float) -> bool:
    """Whether ``left`` ``[N, K]`` is :func:`rest` of the others, but for rounding.

    That is: of the stored numbers once, and once more where the model was cast meanwhile, and of
    the sums in B A, which float32's products may take in fewer bits on request.
    """
    a, b, rounded = start
    change = scaling * (b.to(left.device).double() @ a.to(left.device).double())
    gap = torch.linalg.vector_norm(weight.to(left.device).double() - change - left.double())
    sizes = [torch.linalg.vector_norm(t.double()).item() for t in (left, weight, a, b)]
    of_left, of_weight, of_a, of_b = sizes
    stored = max(torch.finfo(dtype).eps for dtype in (left.dtype, weight.dtype, rounded)) / 2
    wide = torch.promote_types(rounded, a.dtype) == torch.float64
    summed = 2.0**-52 if wide else _BITS[torch.get_float32_matmul_precision()]
    allowed = stored * (of_left + of_weight) + 4 * summed * (of_weight + scaling * of_a * of_b)
    return bool(gap.item() <= allowed)


_BITS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-8}
"""The spacing of what torch's products of float32 multiply, by the precision that was asked for."""


def _sketched(
    w: Tensor, rank: int, rounds: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets of ``w``, from its product with a few random vectors."""
    columns = min(rank + _OVERSAMPLED, *w.shape)
    home = draws_on(generator)
    sketch = torch.randn(w.shape[1], columns, generator=generator, device=home, dtype=w.dtype)
    q, _ = torch.linalg.qr(w @ sketch.to(w.device))
    for _ in range(rounds):
        q, _ = torch.linalg.qr(w.T @ q)
        q, _ = torch.linalg.qr(w @ q)
    u, sigma, v = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, sigma, v
