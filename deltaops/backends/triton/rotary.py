"""``rotary``: heads turned in one pass, and turned back in one."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.backends.calls import RotaryCall
from deltaops.reference.heads import strides

from . import core

_WIDEST = 8192
"""Elements of a head that a program has room for."""
_MOST = 65535 * 8
"""Heads: programs along the second axis of a grid in CUDA, and heads of a program."""


def unsupported(call: RotaryCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, call.table_dtype):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    if call.d > _WIDEST:
        return f"takes heads of up to {_WIDEST} elements, not {call.d}"
    return f"takes at most {_MOST} heads, not {call.h}" if call.h > _MOST else None


def forward(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(x, cos, sin, tokens_first, backward=False)


def backward(grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
    """See :class:`deltaops.backends.base.RotaryBackend`."""
    return _rotary(grad_y, cos, sin, tokens_first, backward=True)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, *, backward: bool) -> Tensor:
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    # in place: a view would refuse to be changed in place by whoever gets it from autograd
    y = torch.empty(torch.Size(x.shape), dtype=x.dtype, device=x.device)
    y = y.as_strided_(x.shape, strides(x.shape, tokens_first))
    if y.numel():
        with core.device_of(x):
            core.kernels("rotary").rotary(x, cos, sin, y, backward=backward)
    return y
