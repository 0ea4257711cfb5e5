"""Autograd for ``bottleneck``: a Function for eager calls, and the registered op.

Both save x (where a gradient of ``down``, or any past a norm, is wanted), the small parameters, the
pre-activation h ``[M, R]`` and the norm's statistics ``[M, 2]``. The residual is not saved: where
it is another tensor its gradient is grad_y itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import AdapterBackend, Backend, BottleneckCall
from deltaops.dispatch import select

from .paths import shaped
from .registered import register


class Forward(NamedTuple):
    """What a forward pass takes; x ``[..., K]``."""

    x: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scaling: float
    eps: float
    activation: str
    norm: str
    residual_is_x: bool


class Backward(NamedTuple):
    """What a backward pass takes; x only where it is needed."""

    grad_y: Tensor
    x: Tensor | None
    h: Tensor
    stats: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float
    activation: str
    norm: str
    residual_is_x: bool


def call_of(given: Forward | Backward) -> BottleneckCall:
    """The call of these tensors; grad_y ``[..., K]`` stands for x."""
    like = given.x if isinstance(given, Forward) else given.grad_y
    rank, k = given.down.shape
    return BottleneckCall(
        "cpu" if like.is_cpu else like.device.type,
        like.dtype,
        tuple([t.dtype for t in (given.down, given.gamma, given.beta) if t is not None]),
        like.numel() // k,
        k,
        rank,
        given.activation,
        given.norm,
    )


def run_forward(runner: Backend, given: Forward) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = given.x, given.residual
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    added = residual if residual is None or x.dim() == 2 else residual.reshape(flat.shape)
    y, h, stats = cast(AdapterBackend, runner).bottleneck_forward(
        flat, flat if given.residual_is_x else added, *given[2:12]
    )
    y = y.contiguous()  # as the fake says; eager torch's, and the reference's, has x's strides
    return shaped(y, x.shape), h, stats


def run_backward(runner: Backend, given: Backward, needs: Sequence[bool]) -> list[Tensor]:
    grad_y, x = given.grad_y, given.x
    k = grad_y.shape[-1]
    grads = cast(AdapterBackend, runner).bottleneck_backward(
        grad_y if grad_y.dim() == 2 else grad_y.reshape(-1, k),
        x if x is None or x.dim() == 2 else x.reshape(-1, k),
        *given[2:],
        needs,
    )
    if needs[0]:
        grads[0] = shaped(grads[0].contiguous(), grad_y.shape)
    return grads


def _needs_x(norm: str, wants: Sequence[bool]) -> bool:
    """Of (x, residual, gamma, beta, down, …)."""
    return wants[4] or (norm != "none" and (wants[0] or wants[2] or wants[3]))


class BottleneckFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, runner: Backend, *arguments: Any) -> Tensor:  # those of Forward
        given = Forward(*arguments)
        y, h, stats = run_forward(runner, given)
        saved = given.x if _needs_x(given.norm, ctx.needs_input_grad[1:]) else None
        ctx.save_for_backward(saved, h, stats, given.gamma, given.beta, given.down, given.up)
        ctx.settings = given.scaling, given.activation, given.norm, given.residual_is_x
        ctx.runner = runner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[1:]
        needs = [wants[0], *wants[2:8]]
        grad_y = grad_y.resolve_neg()
        given = Backward(grad_y, *ctx.saved_tensors, *ctx.settings)
        found = iter(run_backward(ctx.runner, given, needs) if any(needs) else ())
        grads = [next(found) if need else None for need in needs]
        return (None, grads[0], grad_y if wants[1] else None, *grads[1:], *[None] * 5)


# --------------------------------------------------------------------------------- registered op


def _op_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    forward = Forward(*given)
    return run_forward(select(call_of(forward), backend), forward)


def _op_backward(*arguments: Any) -> list[Tensor]:
    *given, needs, backend = arguments
    backward = Backward(*given)
    return run_backward(select(call_of(backward), backend), backward, needs)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = Forward(*arguments[:-1])
    x = given.x
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((m, given.down.shape[0]), dtype=dtype),
        x.new_empty((0 if given.norm == "none" else m, 2), dtype=dtype),
    )


def _fake_backward(*arguments: Any) -> list[Tensor]:
    *given, needs, _backend = arguments
    grad_y, _x, _h, _stats, gamma, beta, down, up = Backward(*given)[:8]
    rank, k = down.shape
    shapes = ((k,), (k,), (rank, k), (rank,), (k, rank), (k,))
    likes = (gamma, beta, down, down, up, up)
    grads = [grad_y.new_empty(grad_y.shape)] if needs[0] else []
    for shape, like, need in zip(shapes, likes, needs[1:], strict=True):
        if need and like is not None:
            grads.append(like.new_empty(shape))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, ctx.backend = inputs
    given = Forward(*arguments)
    ctx.mark_non_differentiable(*output[1:])
    wants = [t is not None and t.requires_grad for t in arguments[:8]]
    saved = given.x if _needs_x(given.norm, wants) else None
    ctx.save_for_backward(saved, *output[1:], given.gamma, given.beta, given.down, given.up)
    ctx.settings = given.scaling, given.activation, given.norm, given.residual_is_x


def _op_autograd(
    ctx: Any, grad_y: Tensor, _grad_h: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Any, ...]:
    wants = ctx.needs_input_grad
    needs = [wants[0], *wants[2:8]]
    found = iter(
        torch.ops.deltaops.bottleneck_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend
        )
        if any(needs)
        else ()
    )
    grads = [next(found) if need else None for need in needs]
    return (grads[0], grad_y if wants[1] else None, *grads[1:], *[None] * 6)


register(
    "bottleneck(Tensor x, Tensor? residual, Tensor? gamma, Tensor? beta, Tensor down, "
    "Tensor? down_bias, Tensor up, Tensor? up_bias, float scaling, float eps, str activation, "
    "str norm, bool residual_is_x, str backend) -> (Tensor y, Tensor h, Tensor stats)",
    "bottleneck_backward(Tensor grad_y, Tensor? x, Tensor h, Tensor stats, Tensor? gamma, "
    "Tensor? beta, Tensor down, Tensor up, float scaling, str activation, str norm, "
    "bool residual_is_x, bool[] needs, str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it with torch's own functions in eager mode instead.",
)
