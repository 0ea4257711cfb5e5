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
