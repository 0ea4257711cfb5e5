"""``rotary`` in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import DTYPES, core
from .heads import as_heads, empty_heads


def forward(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(x, cos, sin, tokens_first, backward=False)


def backward(grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(grad_y, cos, sin, tokens_first, backward=True)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, *, backward: bool) -> Tensor:
    """Either way: backward turns the heads back."""
    x = as_heads(x)
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
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
        (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
        backward,
        torch.get_num_threads(),
    )
    return y
