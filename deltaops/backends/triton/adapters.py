"""``bottleneck`` and ``norm_bias``: one walk over the rows each way, sums in fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.backends.calls import BottleneckCall, NormBiasCall

from . import core

_PROGRAMS = 65535
"""Along the second axis of a grid in CUDA."""
_MOST_COLUMNS = 32 * _PROGRAMS
"""K, where a sequential adapter goes in two: its narrowest tile has 32 columns."""
_MOST_RANKS = 16 * _PROGRAMS


def unsupported(call: BottleneckCall | NormBiasCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, *call.parameter_dtypes):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    if isinstance(call, BottleneckCall):
        if call.k > _MOST_COLUMNS:
            return f"takes at most {_MOST_COLUMNS} columns, not {call.k}"
        if call.rank > _MOST_RANKS:
            return f"takes ranks of up to {_MOST_RANKS}, not {call.rank}"
    return None


def bottleneck_forward(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scaling: float,
    eps: float,
    activation: str,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`deltaops.backends.base.AdapterBackend`."""
    m, k = x.shape
    y = torch.empty((m, k), dtype=x.dtype, device=x.device)
    h = torch.empty((m, down.shape[0]), dtype=torch.float32, device=x.device)
    stats = torch.empty((0 if norm == "none" else m, 2), dtype=torch.float32, device=x.device)
    if m:
        with core.device_of(x):
            core.kernels("bottleneck").bottleneck(
                x,
                residual,
                _whole(gamma),
                _whole(beta),
                down,
                _whole(down_bias),
                up,
                _whole(up_bias),
                y,
                h,
                stats,
                scaling=scaling,
                eps=eps,
                activation=activation,
                norm=norm,
                precision=core.kernels("precision").rank_precision(x.dtype, [down]),
            )
    return y, h, stats


def bottleneck_backward(
    grad_y: Tensor,
    x: Tensor | None,
    h: Tensor,
    stats: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    activation: str,
    norm: str,
    residual_is_x: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.AdapterBackend`."""
    (m, k), rank, device = grad_y.shape, down.shape[0], grad_y.device
    grad_x = torch.empty((m, k), dtype=grad_y.dtype, device=device) if needs[0] else None
    wanted = [
        torch.empty(shape, dtype=like.dtype, device=device) if need and like is not None else None
        for shape, like, need in zip(
            ((k,), (k,), (rank, k), (rank,), (k, rank), (k,)),
            (gamma, beta, down, down, up, up),
            needs[1:],
            strict=True,
        )
    ]
    grads = [g for g in (grad_x, *wanted) if g is not None]
    if not m:
        return [g.zero_() for g in grads]
    grad_gamma, grad_beta, grad_down, grad_down_bias, grad_up, grad_up_bias = wanted
    gamma, beta, h, stats = _whole(gamma), _whole(beta), h.contiguous(), stats.contiguous()
    with core.device_of(grad_y):
        precision = core.kernels("precision").rank_precision(grad_y.dtype, [down])
        capability = core.capability(grad_y)
        kernels = core.kernels("bottleneck_grads")
        # S is of one use: where dUp is not wanted h stands in for it
        s = h if grad_up is None else torch.empty_like(h)
        if any(g is not None for g in (grad_x, *wanted[:5])):
            grad_h = torch.empty(h.shape, dtype=torch.float32, device=device)
            kernels.grad_rows(
                grad_y,
                x,
                h,
                stats,
                gamma,
                down,
                up,
                scaling=scaling,
                activation=activation,
                norm=norm,
                residual_is_x=residual_is_x,
                precision=precision,
                grad_x=grad_x,
                grad_h=grad_h,
                s=None if grad_up is None else s,
                capability=capability,
            )
        if any(g is not None for g in wanted[:4]):
            kernels.grad_parameters(
                grad_h,
                x,
                stats,
                gamma,
                beta,
                down,
                norm=norm,
                precision=precision,
                grad_gamma=grad_gamma,
                grad_beta=grad_beta,
                grad_down=grad_down,
                grad_down_bias=grad_down_bias,
                capability=capability,
            )
        if grad_up is not None or grad_up_bias is not None:
            core.kernels("grad_up").grad_up(
                grad_y,
                up,
                s,
                scaling=1.0,
                precision=precision,
                grad_b=grad_up,
                grad_bias=grad_up_bias,
                capability=capability,
            )
    return grads


def norm_bias_forward(
    x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.AdapterBackend`."""
    y = torch.empty(torch.Size(x.shape), dtype=x.dtype, device=x.device)
    rows = 0 if norm == "none" else len(x)
    stats = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    if y.numel():
        with core.device_of(x):
            core.kernels("norm").norm(
                x,
                _whole(gamma),
                _whole(bias),
                y,
                stats,
                eps=eps,
                norm=norm,
                capability=core.capability(x),
            )
    return y, stats


def norm_bias_backward(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
    norm: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.AdapterBackend`."""
    (m, k), device = grad_y.shape, grad_y.device
    grad_x = torch.empty((m, k), dtype=grad_y.dtype, device=device) if needs[0] else None
    grad_gamma, grad_bias = (
        torch.empty((k,), dtype=dtype, device=device) if need else None for need in needs[1:]
    )
    grads = [g for g in (grad_x, grad_gamma, grad_bias) if g is not None]
    if not m:
        return [g.zero_() for g in grads]
    with core.device_of(grad_y):
        core.kernels("norm").norm_grads(
            grad_y,
            x,
            stats.contiguous(),
            _whole(gamma),
            norm=norm,
            grad_x=grad_x,
            grad_gamma=grad_gamma,
            grad_bias=grad_bias,
        )
    return grads


def _whole(t: Tensor | None) -> Tensor | None:
    """A vector whose elements lie side by side, as the kernels read them."""
    return None if t is None else t.contiguous()
