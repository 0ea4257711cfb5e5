"""Rotary position embedding   (Su et al. 2021)

    y = x · cos + rot(x) · sin,    dx = dy · cos − rot(dy · sin),    rot(x) = (−x₂, x₁)

x, y [B,H,L,D], cos and sin [B or 1,L,D]; x₁ and x₂ are the halves of a head, as Llama has them.
Backward is forward with the angles turned back, so x is not kept. Computed in float32 at least and
rounded once: eager torch rounds three times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import arrange


def forward(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """``y [B, H, L, D]`` in the dtype of ``x``; memory as in :func:`.heads.arrange`."""
    work, c, s = _wide(x, cos, sin)
    return arrange((work * c + _rot(work) * s).to(x.dtype), tokens_first)


def backward(grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """``grad_x [B, H, L, D]`` in the dtype of ``grad_y``; memory as in :func:`.heads.arrange`."""
    work, c, s = _wide(grad_y, cos, sin)
    return arrange((work * c - _rot(work * s)).to(grad_y.dtype), tokens_first)


def _wide(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(x.dtype, torch.float32)
    return x.to(work), cos.to(work).unsqueeze(1), sin.to(work).unsqueeze(1)


def _rot(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
