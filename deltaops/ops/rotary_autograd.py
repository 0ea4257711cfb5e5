"""Autograd for ``rotary``: a Function for eager calls, and the registered op.

Both save cos and sin alone. The gradient of x is laid out as x is, whatever the strides of that of
y: what follows it is the transpose back, and then a projection that wants rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, RotaryBackend, RotaryCall
from deltaops.dispatch import select
from deltaops.errors import GradientError
from deltaops.reference.heads import strides

from .registered import register


def call_of(x: Tensor, cos: Tensor) -> RotaryCall:
    """The call of these tensors; x ``[B, H, L, D]``."""
    device = "cpu" if x.is_cpu else x.device.type
    return RotaryCall(device, x.dtype, cos.dtype, *x.shape)


def tokens_first(x: Tensor) -> bool:
    """Whether the memory of x ``[B, H, L, D]`` is ordered ``[B, L, H, D]``."""
    return bool(x.stride(1) < x.stride(2))  # a symbol while compiling, which is settled here


def refuse_table_gradient(cos: Tensor, sin: Tensor) -> None:
    """Raise GradientError where one of the two requires a gradient, which nobody would compute."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise GradientError(
                f"rotary: cos and sin get no gradient, and {name} requires one. Pass "
                f"{name}.detach(), or compute x * cos + rotate_half(x) * sin in torch."
            )


def run_forward(x: Tensor, cos: Tensor, sin: Tensor, runner: Backend) -> Tensor:
    return cast(RotaryBackend, runner).rotary_forward(x, cos, sin, tokens_first(x))


def run_backward(
    grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, runner: Backend
) -> Tensor:
    return cast(RotaryBackend, runner).rotary_backward(grad_y, cos, sin, tokens_first)


class RotaryFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, runner: Backend) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.settings = tokens_first(x), runner
        return run_forward(x, cos, sin, runner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (
            run_backward(grad_y.resolve_neg(), *ctx.saved_tensors, *ctx.settings),
            None,
            None,
            None,
        )


# --------------------------------------------------------------------------------- registered op


def _op_forward(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    return run_forward(x, cos, sin, select(call_of(x, cos), backend))


def _op_backward(
    grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, backend: str
) -> Tensor:
    return run_backward(grad_y, cos, sin, tokens_first, select(call_of(grad_y, cos), backend))


def _dense(like: Tensor, tokens_first: bool) -> Tensor:
    return like.new_empty_strided(like.shape, strides(like.shape, tokens_first))


def _fake_forward(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    return _dense(x, tokens_first(x))


def _fake_backward(
    grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, backend: str
) -> Tensor:
    return _dense(grad_y, tokens_first)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, backend = inputs
    refuse_table_gradient(cos, sin)
    ctx.save_for_backward(cos, sin)
    ctx.settings = tokens_first(x), backend


def _op_autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    tables, settings = ctx.saved_tensors, ctx.settings
    return torch.ops.deltaops.rotary_backward(grad_y, *tables, *settings), None, None, None


register(
    "rotary(Tensor x, Tensor cos, Tensor sin, str backend) -> Tensor",
    "rotary_backward(Tensor grad_y, Tensor cos, Tensor sin, bool tokens_first, str backend) "
    "-> Tensor",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it as x * cos + rotate_half(x) * sin in torch instead.",
)
