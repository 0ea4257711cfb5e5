"""``gated`` in the native core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import ACTIVATIONS, DTYPES, as_rows, core, empty, pointer


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """See :class:`deltaops.backends.base.GatedBackend`."""
    gate = as_rows(gate)
    if up is not None:
        up = as_rows(up)
    m, k = gate.shape
    y = empty(m, k, gate.dtype)
    core().gated_forward(
        DTYPES[gate.dtype],
        m,
        k,
        gate.data_ptr(),
        gate.stride(0),
        pointer(up),
        0 if up is None else up.stride(0),
        y.data_ptr(),
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.GatedBackend`."""
    grad_y, gate = as_rows(grad_y), as_rows(gate)
    if up is not None:
        up = as_rows(up)
    m, k = gate.shape
    wanted = [empty(m, k, gate.dtype) if need else None for need in needs]
    core().gated_backward(
        DTYPES[gate.dtype],
        m,
        k,
        grad_y.data_ptr(),
        grad_y.stride(0),
        gate.data_ptr(),
        gate.stride(0),
        pointer(up),
        0 if up is None else up.stride(0),
        *[pointer(t) for t in wanted],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return [g for g in wanted if g is not None]
