"""Rotary position embedding   (Su et al. 2021)

    y = x · cos + rot(x) · sin,    dx = dy · cos − rot(dy · sin),    rot(x) = (−x₂, x₁)

x, y [B,H,L,D], cos and sin [B or 1,L,D]; x₁ and x₂ are the halves of a head, as Llama has them.
Backward is forward with the angles turned back, so x is not kept. Computed in float32 at least and
rounded once: eager torch rounds three times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """``y [B, H, L, D]`` in the dtype of ``x``; see :func:`arrange` for its memory."""
    work, c, s = _wide(x, cos, sin)
    return arrange((work * c + _rot(work) * s).to(x.dtype), tokens_first)


def backward(grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """``grad_x [B, H, L, D]`` in the dtype of ``grad_y``; see :func:`arrange` for its memory."""
    work, c, s = _wide(grad_y, cos, sin)
    return arrange((work * c - _rot(work * s)).to(grad_y.dtype), tokens_first)


def strides(shape: Sequence[int], tokens_first: bool) -> tuple[int, int, int, int]:
    """Of ``[B, H, L, D]`` in dense memory: in this order, or ``[B, L, H, D]`` seen through a
    transpose."""
    _, h, l, d = shape  # noqa: E741
    return (l * h * d, d, h * d, 1) if tokens_first else (h * l * d, l * d, d, 1)


def arrange(t: Tensor, tokens_first: bool) -> Tensor:
    """``t`` with :func:`strides`, never as a view: the op's result may be changed in place."""
    wanted = strides(t.shape, tokens_first)
    return t if t.stride() == wanted else t.new_empty_strided(t.shape, wanted).copy_(t)


def _wide(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(x.dtype, torch.float32)
    return x.to(work), cos.to(work).unsqueeze(1), sin.to(work).unsqueeze(1)


def _rot(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
