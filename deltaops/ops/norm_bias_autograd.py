"""Autograd for ``norm_bias``: a Function for eager calls, and the registered op.

Both save x (only where a gradient of gamma, or of x past a norm, is wanted), gamma and the
statistics ``[M, 2]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import AdapterBackend, Backend, NormBiasCall
from deltaops.dispatch import select

from .made import Ahead
from .paths import shaped
from .registered import register


def call_of(x: Tensor, gamma: Tensor | None, bias: Tensor | None, norm: str) -> NormBiasCall:
    """The call of these tensors; x ``[..., K]``."""
    k = x.shape[-1]
    return NormBiasCall(
        "cpu" if x.is_cpu else x.device.type,
        x.dtype,
        tuple([t.dtype for t in (gamma, bias) if t is not None]),
        x.numel() // k,
        k,
        norm,
    )


def run_forward(
    x: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    runner: Backend,
    ahead: Ahead | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the statistics; S of the layers of ``ahead``, which it then holds."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if ahead is not None:
        with torch.no_grad():  # the factors train; their gradients are the layers' affair
            y, stats, ahead.s = ahead.runner.norm_and_s(flat, gamma, eps, ahead.members)
        return shaped(y, x.shape), stats
    y, stats = cast(AdapterBackend, runner).norm_bias_forward(flat, gamma, bias, eps, norm)
    y = y.contiguous()  # as the fake says; eager torch's, and the reference's, has x's strides
    return shaped(y, x.shape), stats


def run_backward(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
    norm: str,
    needs: Sequence[bool],
    runner: Backend,
) -> list[Tensor]:
    k = grad_y.shape[-1]
    grad = grad_y if grad_y.dim() == 2 else grad_y.reshape(-1, k)
    flat = x if x is None or x.dim() == 2 else x.reshape(-1, k)
    grads = cast(AdapterBackend, runner).norm_bias_backward(
        grad, flat, stats, gamma, dtype, norm, needs
    )
    if needs[0]:
        grads[0] = shaped(grads[0].contiguous(), grad_y.shape)
    return grads


def _parameter_dtype(x: Tensor, gamma: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return gamma.dtype if gamma is not None else bias.dtype if bias is not None else x.dtype


def _needs_x(norm: str, of_x: bool, of_gamma: bool) -> bool:
    return of_gamma or (of_x and norm != "none")


class NormBiasFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        bias: Tensor | None,
        eps: float,
        norm: str,
        runner: Backend,
        ahead: Ahead | None,
    ) -> Tensor:
        y, stats = run_forward(x, gamma, bias, eps, norm, runner, ahead)
        needs_x = _needs_x(norm, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(x if needs_x else None, stats, gamma)
        ctx.settings = _parameter_dtype(x, gamma, bias), norm, runner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, gamma = ctx.saved_tensors
        dtype, norm, runner = ctx.settings
        needs = ctx.needs_input_grad[:3]
        grad_y = grad_y.resolve_neg()
        found = iter(run_backward(grad_y, x, stats, gamma, dtype, norm, needs, runner))
        return (*(next(found) if need else None for need in needs), None, None, None, None)


# --------------------------------------------------------------------------------- registered op


def _op_forward(
    x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str, backend: str
) -> tuple[Tensor, Tensor]:
    runner = select(call_of(x, gamma, bias, norm), backend)
    return run_forward(x, gamma, bias, eps, norm, runner)


def _op_backward(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
    norm: str,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    call = call_of(grad_y, gamma, None, norm)._replace(parameter_dtypes=(dtype,))
    return run_backward(grad_y, x, stats, gamma, dtype, norm, needs, select(call, backend))


def _fake_forward(
    x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str, backend: str
) -> tuple[Tensor, Tensor]:
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((0 if norm == "none" else m, 2), dtype=dtype)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor | None,
    stats: Tensor,
    gamma: Tensor | None,
    dtype: torch.dtype,
    norm: str,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    k = grad_y.shape[-1]
    outputs = [
        grad_y.new_empty(grad_y.shape),
        grad_y.new_empty((k,), dtype=dtype),
        grad_y.new_empty((k,), dtype=dtype),
    ]
    return [t for t, need in zip(outputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, bias, _eps, norm, backend = inputs
    ctx.mark_non_differentiable(output[1])
    needs_x = _needs_x(norm, x.requires_grad, gamma is not None and gamma.requires_grad)
    ctx.save_for_backward(x if needs_x else None, output[1], gamma)
    ctx.settings = _parameter_dtype(x, gamma, bias), norm, backend


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_stats: Tensor | None) -> tuple[Any, ...]:
    x, stats, gamma = ctx.saved_tensors
    dtype, norm, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:3])
    found = iter(
        torch.ops.deltaops.norm_bias_backward(grad_y, x, stats, gamma, dtype, norm, needs, backend)
    )
    return (*(next(found) if need else None for need in needs), None, None, None)


register(
    "norm_bias(Tensor x, Tensor? gamma, Tensor? bias, float eps, str norm, str backend) "
    "-> (Tensor y, Tensor stats)",
    "norm_bias_backward(Tensor grad_y, Tensor? x, Tensor stats, Tensor? gamma, ScalarType dtype, "
    "str norm, bool[] needs, str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it with torch.nn.functional.layer_norm instead.",
)
