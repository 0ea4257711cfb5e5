"""``gated``: activation and product in one pass each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.backends.calls import GatedCall

from . import core

_MOST = 65535 * 1024
"""Columns: programs along the second axis of a grid in CUDA, and columns of a program."""


def unsupported(call: GatedCall) -> str | None:
    """None, or what the kernels do not take."""
    if call.dtype not in core.DTYPES:
        return f"takes float32, float16 and bfloat16, not {call.dtype}"
    if call.alone:
        return "has no kernel for an activation alone: torch's own is one pass, too"
    return f"takes at most {_MOST} columns, not {call.k}" if call.k > _MOST else None


def forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """See :class:`deltaops.backends.base.GatedBackend`; ``up`` is there."""
    y = torch.empty(torch.Size(gate.shape), dtype=gate.dtype, device=gate.device)
    if y.numel():
        with core.device_of(gate):
            core.kernels("gated").gated(gate, up, y, activation=activation)
    return y


def backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.GatedBackend`."""
    shape = torch.Size(gate.shape)
    grad_gate, grad_up = (
        torch.empty(shape, dtype=gate.dtype, device=gate.device) if need else None for need in needs
    )
    if gate.numel() and (grad_gate is not None or grad_up is not None):
        with core.device_of(gate):
            core.kernels("gated").gated_grads(
                grad_y, gate, up, activation=activation, grad_gate=grad_gate, grad_up=grad_up
            )
    return [g for g in (grad_gate, grad_up) if g is not None]
