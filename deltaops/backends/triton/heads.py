"""How tensors of heads lie: what the attention kernels read, and what they write."""

from __future__ import annotations

import torch
from torch import Tensor


def adjacent(t: Tensor) -> Tensor:
    """With the elements of a head side by side, as the kernels read them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def by_tokens(like: Tensor) -> Tensor:
    """Memory ``[B, L, H, D]`` for a tensor ``[B, H, L, D]``."""
    b, h, l, d = like.shape  # noqa: E741
    return torch.empty((b, l, h, d), dtype=like.dtype, device=like.device).transpose(1, 2)


def is_by_tokens(t: Tensor) -> bool:
    """Whether ``t [B, H, L, D]`` lies in memory as :func:`by_tokens` makes it."""
    return t.transpose(1, 2).is_contiguous()


def arranged(t: Tensor) -> Tensor:
    """``t [B, H, L, D]`` in memory ``[B, L, H, D]``; a copy where it lies in another."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)
