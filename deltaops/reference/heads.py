"""Where the heads of a tensor ``[B, H, L, D]`` lie.

A projection writes the heads of a token side by side, ``[B, L, H, D]``, and attention sees that
memory through a transpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def strides(shape: Sequence[int], tokens_first: bool) -> tuple[int, int, int, int]:
    """Of ``[B, H, L, D]`` in dense memory: in this order, or ``[B, L, H, D]`` seen through a
    transpose."""
    _, h, l, d = shape  # noqa: E741
    return (l * h * d, d, h * d, 1) if tokens_first else (h * l * d, l * d, d, 1)


def arrange(t: Tensor, tokens_first: bool) -> Tensor:
    """``t`` with :func:`strides`, never as a view: the op's result may be changed in place."""
    wanted = strides(t.shape, tokens_first)
    if t.stride() == wanted and not t._is_view():
        return t
    # nothing that has elements is written in place: exporters trace this
    if t.numel() == 0:
        return t.new_empty_strided(t.shape, wanted).copy_(t)
    if not tokens_first:
        return t.clone(memory_format=torch.contiguous_format)
    if t.stride() != wanted:
        t = t.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return t.clone()
