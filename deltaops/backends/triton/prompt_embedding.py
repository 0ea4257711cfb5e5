"""``prompt_embedding``: one gather, and an ordered sum over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.backends.calls import PromptEmbeddingCall

from . import core

_MOST = 65535 * 64
"""Columns: programs along the second axis of a grid in CUDA, and the fewest columns of a program
that has not all of them."""


def unsupported(call: PromptEmbeddingCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, call.prompt_dtype):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    return f"takes at most {_MOST} columns, not {call.d}" if call.d > _MOST else None


def forward(prompt: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """See :class:`deltaops.backends.base.PromptEmbeddingBackend`."""
    (length, d), (batch, tokens) = prompt.shape, ids.shape
    y = torch.empty((batch, length + tokens, d), dtype=table.dtype, device=table.device)
    if y.numel():
        with core.device_of(table):
            core.kernels("prompt").prompt_embedding(prompt, ids, table, y)
    return y


def backward(grad_y: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """See :class:`deltaops.backends.base.PromptEmbeddingBackend`."""
    grad = torch.empty((length, grad_y.shape[2]), dtype=dtype, device=grad_y.device)
    if grad.numel():
        with core.device_of(grad_y):
            core.kernels("prompt").prompt_embedding_grad(grad_y, grad)
    return grad
