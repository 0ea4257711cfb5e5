"""``delta_linear``: two-segment GEMMs, one pass over dy, split-M reductions in fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.backends.calls import DeltaLinearCall

from . import core


def unsupported(call: DeltaLinearCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, *call.adapter_dtypes):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    if len(set(call.adapter_dtypes)) > 1:
        return "the branches must share one dtype"
    if call.activations:
        return f"has no kernel for a branch with an activation yet ({call.activations[0]})"
    if call.branch_bias:
        return "has no kernel for a branch with a bias yet"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.Backend`."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    with core.device_of(x):
        if not y.numel():
            width = sum(t.shape[0] for t in a)
            return y, torch.empty((x.shape[0], width), dtype=torch.float32, device=x.device)
        precision = core.kernels("precision").rank_precision(x.dtype, a)
        s: Tensor = core.kernels("project").project_branches(
            x, list(a), list(scaling), list(dropout), seed, precision
        )
        core.kernels("forward").forward_gemm(
            x, weight, bias, s, list(b), y, precision=precision, capability=core.capability(x)
        )
    return y, s


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.Backend`."""
    count = len(a)
    m, k = grad_y.shape[0], weight.shape[1]
    grad_x = torch.empty((m, k), dtype=grad_y.dtype, device=grad_y.device) if needs[0] else None
    grad_bias = (
        torch.empty(weight.shape[0], dtype=grad_y.dtype, device=grad_y.device) if needs[1] else None
    )
    wanted = [
        torch.empty(t.shape, dtype=t.dtype, device=grad_y.device) if needs[2 + i] else None
        for i, t in enumerate((*a, *b))
    ]
    grads = [g for g in (grad_x, grad_bias, *wanted) if g is not None]
    if not grad_y.numel():
        return [g.zero_() for g in grads]
    with core.device_of(grad_y):
        precision = core.kernels("precision").rank_precision(grad_y.dtype, a)
        grad_s = torch.empty(s.shape, dtype=torch.float32, device=grad_y.device)
        column = 0
        for i in range(count):
            piece = slice(column, column + a[i].shape[0])
            column += a[i].shape[0]
            need_s = grad_x is not None or wanted[i] is not None
            need_bias = grad_bias is not None and i == 0
            if need_s or wanted[count + i] is not None or need_bias:
                core.kernels("grad_up").grad_up(
                    grad_y,
                    b[i],
                    s[:, piece],
                    scaling=scaling[i],
                    precision=precision,
                    grad_s=grad_s[:, piece] if need_s else None,
                    grad_b=wanted[count + i],
                    grad_bias=grad_bias if need_bias else None,
                )
            if wanted[i] is not None:
                core.kernels("grad_down").grad_down(
                    grad_s[:, piece],
                    x,
                    wanted[i],
                    precision=precision,
                    dropout=dropout[i],
                    seed=seed,
                    stream=i,
                )
        if grad_bias is not None and count == 0:
            torch.sum(grad_y, 0, out=grad_bias)
        if grad_x is not None:
            core.kernels("grad_input").grad_input_gemm(
                grad_y,
                weight,
                grad_s,
                list(a),
                grad_x,
                dropout=list(dropout),
                seed=seed,
                precision=precision,
                capability=core.capability(grad_y),
            )
    return grads
