"""``bottleneck`` and ``norm_bias`` in the native core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import ACTIVATIONS, DTYPES, NORMS, as_rows, core, empty, parameter, pointer, whole


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
    x = as_rows(x)
    if residual is not None:
        residual = as_rows(residual)
    parameters = [whole(t) for t in (gamma, beta, down, down_bias, up, up_bias)]
    (m, k), rank = x.shape, down.shape[0]
    y = empty(m, k, x.dtype)
    h = torch.empty((m, rank), dtype=torch.float32)
    stats = torch.empty((0 if norm == "none" else m, 2), dtype=torch.float32)
    core().bottleneck_forward(
        DTYPES[x.dtype],
        m,
        k,
        rank,
        x.data_ptr(),
        x.stride(0),
        pointer(residual),
        0 if residual is None else residual.stride(0),
        *[parameter(t) for t in parameters],
        y.data_ptr(),
        h.data_ptr(),
        stats.data_ptr(),
        scaling,
        eps,
        ACTIVATIONS[activation],
        NORMS[norm],
        torch.get_num_threads(),
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
    grad_y, h, stats = as_rows(grad_y), h.contiguous(), stats.contiguous()
    if x is not None:
        x = as_rows(x)
    parameters = [whole(t) for t in (gamma, beta, down, up)]
    (m, k), rank = grad_y.shape, down.shape[0]
    grad_x = empty(m, k, grad_y.dtype) if needs[0] else None
    wanted = [
        torch.empty(shape, dtype=like.dtype) if need and like is not None else None
        for shape, like, need in zip(
            ((k,), (k,), (rank, k), (rank,), (k, rank), (k,)),
            (gamma, beta, down, down, up, up),
            needs[1:],
            strict=True,
        )
    ]
    core().bottleneck_backward(
        DTYPES[grad_y.dtype],
        m,
        k,
        rank,
        grad_y.data_ptr(),
        grad_y.stride(0),
        pointer(x),
        0 if x is None else x.stride(0),
        h.data_ptr(),
        stats.data_ptr(),
        *[parameter(t) for t in parameters],
        pointer(grad_x),
        *[parameter(t) for t in wanted],
        scaling,
        ACTIVATIONS[activation],
        NORMS[norm],
        residual_is_x,
        torch.get_num_threads(),
    )
    return [g for g in (grad_x, *wanted) if g is not None]


def norm_bias_forward(
    x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.AdapterBackend`."""
    x, gamma, bias = as_rows(x), whole(gamma), whole(bias)
    m, k = x.shape
    y = empty(m, k, x.dtype)
    stats = torch.empty((0 if norm == "none" else m, 2), dtype=torch.float32)
    core().norm_bias_forward(
        DTYPES[x.dtype],
        m,
        k,
        x.data_ptr(),
        x.stride(0),
        parameter(gamma),
        parameter(bias),
        y.data_ptr(),
        stats.data_ptr(),
        eps,
        NORMS[norm],
        torch.get_num_threads(),
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
    grad_y, stats, gamma = as_rows(grad_y), stats.contiguous(), whole(gamma)
    if x is not None:
        x = as_rows(x)
    m, k = grad_y.shape
    grad_x = empty(m, k, grad_y.dtype) if needs[0] else None
    grad_gamma = torch.empty(k, dtype=dtype) if needs[1] else None
    grad_bias = torch.empty(k, dtype=dtype) if needs[2] else None
    core().norm_bias_backward(
        DTYPES[grad_y.dtype],
        m,
        k,
        grad_y.data_ptr(),
        grad_y.stride(0),
        pointer(x),
        0 if x is None else x.stride(0),
        stats.data_ptr(),
        parameter(gamma),
        pointer(grad_x),
        parameter(grad_gamma),
        parameter(grad_bias),
        NORMS[norm],
        torch.get_num_threads(),
    )
    return [g for g in (grad_x, grad_gamma, grad_bias) if g is not None]
