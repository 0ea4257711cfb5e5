"""Heads ``[B, H, L, D]`` as the native core takes them: adjacent elements, and any strides else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.reference.heads import strides

from .core import empty


def as_heads(t: Tensor) -> Tensor:
    """``[B, H, L, D]`` with adjacent elements in a head; a copy only where it must be."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def empty_heads(shape: Sequence[int], tokens_first: bool, dtype: torch.dtype) -> Tensor:
    """``[B, H, L, D]`` with :func:`strides`, recycled where it is large."""
    b, h, l, d = shape  # noqa: E741
    # In place: a view would refuse to be changed in place by whoever gets it from autograd.
    return empty(b * h * l, d, dtype).as_strided_(shape, strides(shape, tokens_first))


def placed(t: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of the batch, the head and the token, as the core takes heads."""
    return (0, (0, 0, 0)) if t is None else (t.data_ptr(), t.stride()[:3])


def as_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both ``[B or 1, L, D]`` with adjacent elements in a row, and one pair of strides."""
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        return cos.contiguous(), sin.contiguous()
    return cos, sin


def table_strides(cos: Tensor) -> tuple[int, int]:
    """Those of the sequence, 0 where the batch shares the angles, and of the token."""
    return cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)
