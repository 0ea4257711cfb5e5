"""``rotary`` in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import DTYPES, core
from .heads import as_heads, as_tables, empty_heads, table_strides


def forward(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(x, cos, sin, tokens_first, backward=False)


def backward(grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(grad_y, cos, sin, tokens_first, backward=True)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, *, backward: bool) -> Tensor:
    """Either way: backward turns the heads back."""
    x = as_heads(x)
    cos, sin = as_tables(cos, sin)
    y = empty_heads(x.shape, tokens_first, x.dtype)
    core().rotary(
        DTYPES[x.dtype],
        x.shape,
        x.data_ptr(),
        x.stride()[:3],
        y.data_ptr(),
        y.stride()[:3],
        DTYPES[cos.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        table_strides(cos),
        backward,
        torch.get_num_threads(),
    )
    return y
