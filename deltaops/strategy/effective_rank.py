"""How many directions a LoRA update uses.      exp(−Σ pᵢ ln pᵢ),  pᵢ = σᵢ / Σⱼ σⱼ

σ are the singular values of B A, from r x r matrices: σ² are the eigenvalues of (A Aᵀ)(Bᵀ B), which
are those of S (Bᵀ B) S with S the square root of A Aᵀ; in float64. From 1, one direction, to r.
Source: Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.surgery import Handle

from .noise import Group

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def effective_ranks(handle: Handle) -> dict[Group, float]:
    """Part and place → effective rank of its update; a part's mean over its places has no place.

    Places without LoRA, experts, and updates that are zero or not finite have none.
    """
    by_rank: dict[tuple[int, torch.device], list[tuple[Group, Tensor, Tensor]]] = {}
    for site, tensors in handle.by_place().items():
        for one, other in _PAIRS:
            if one in tensors and tensors[one].dim() == 2:
                group = (site.part or handle.name, site.path)
                a, b = (tensors[key].detach().double() for key in (one, other))
                found = (group, a @ a.T, b.T @ b)
                by_rank.setdefault((a.shape[0], a.device), []).append(found)
    ranks: dict[Group, float] = {}
    for same in by_rank.values():
        values = effective_rank(
            torch.stack([a for _, a, _ in same]), torch.stack([b for _, _, b in same])
        )
        for (group, _, _), value in zip(same, values.tolist(), strict=True):
            if value > 0:
                ranks[group] = value
    parts: dict[str, list[float]] = {}
    for (part, _), value in ranks.items():
        parts.setdefault(part, []).append(value)
    return ranks | {(part, ""): sum(found) / len(found) for part, found in parts.items()}


def effective_rank(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """``[..., r, r]`` of A Aᵀ and of Bᵀ B, float64 → ``[...]``; 0 where B A is 0 or not finite."""
    whole = (gram_a.isfinite() & gram_b.isfinite()).flatten(-2).all(-1)
    gram_a, gram_b = (torch.where(whole[..., None, None], g, 0.0) for g in (gram_a, gram_b))
    values, vectors = torch.linalg.eigh(gram_a)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]
    squares = torch.linalg.eigvalsh(root.mT @ gram_b @ root)
    # rounding leaves eigenvalues of about eps where there are none, whose roots would count
    floor = squares.amax(-1, keepdim=True) * squares.shape[-1] * torch.finfo(squares.dtype).eps
    sigma = torch.where(squares > floor, squares, 0.0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(p).sum(-1).exp(), 0.0)
