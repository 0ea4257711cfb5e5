"""``cross_entropy`` in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import DTYPES, as_rows, core, empty


def forward(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
    logits, target = as_rows(logits), target.contiguous()
    state = torch.empty((logits.shape[0], 2), dtype=torch.float32)
    loss = core().cross_entropy_forward(
        DTYPES[logits.dtype],
        *logits.shape,
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        ignore_index,
        mean,
        state.data_ptr(),
        torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32), state


def backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    state: Tensor,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
    logits, target, state = as_rows(logits), target.contiguous(), state.contiguous()
    m, v = logits.shape
    grad = empty(m, v, logits.dtype)
    core().cross_entropy_backward(
        DTYPES[logits.dtype],
        m,
        v,
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        ignore_index,
        mean,
        state.data_ptr(),
        float(grad_loss),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return grad
