"""Autograd for ``attention``: a Function for eager calls, and the registered op.

Both save q, k, v, y, the mask and lse, the logarithm of each query's sum of exponentials; the
Function cos and sin besides, where the backend turns q and k by them. The gradients are laid out as
y is, ``[B, L, H, D]``: what follows them is a transpose back, and then a projection that wants
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import (
    AttentionBackend,
    AttentionCall,
    Backend,
    RotaryAttentionBackend,
)
from deltaops.dispatch import select
from deltaops.reference.heads import strides

from .registered import register


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    runner: Backend,
) -> tuple[Tensor, Tensor]:
    return cast(AttentionBackend, runner).attention_forward(q, k, v, mask, scale, causal)


def run_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
    runner: Backend,
) -> list[Tensor]:
    return cast(AttentionBackend, runner).attention_backward(
        grad_y, q, k, v, y, lse, mask, scale, causal, needs
    )


def run_turned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    runner: Backend,
) -> tuple[Tensor, Tensor]:
    """:func:`run_forward` on q and k turned by cos and sin, where there are any."""
    if cos is None or sin is None:
        return run_forward(q, k, v, mask, scale, causal, runner)
    turning = cast(RotaryAttentionBackend, runner)
    return turning.rotary_attention_forward(q, k, v, cos, sin, mask, scale, causal)


class AttentionFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        runner: Backend,
    ) -> Tensor:
        y, lse = run_turned(q, k, v, cos, sin, mask, scale, causal, runner)
        ctx.save_for_backward(q, k, v, cos, sin, y, lse, mask)
        ctx.settings = scale, causal, runner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        scale, causal, runner = ctx.settings
        needs = ctx.needs_input_grad[:3]
        grad_y = grad_y.resolve_neg()
        q, k, v, cos, sin, y, lse, mask = ctx.saved_tensors
        rest = y, lse, mask, scale, causal, needs
        if cos is None:
            grads = run_backward(grad_y, q, k, v, *rest, runner)
        else:
            turning = cast(RotaryAttentionBackend, runner)
            grads = turning.rotary_attention_backward(grad_y, q, k, v, cos, sin, *rest)
        found = iter(grads)
        return (*(next(found) if need else None for need in needs), *[None] * 6)


# --------------------------------------------------------------------------------- registered op


def _op_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    runner = select(AttentionCall.of(q, k, mask, causal), backend)
    return run_forward(q, k, v, mask, scale, causal, runner)


def _op_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    runner = select(AttentionCall.of(q, k, mask, causal), backend)
    return run_backward(grad_y, q, k, v, y, lse, mask, scale, causal, needs, runner)


def tokens_first(like: Tensor) -> Tensor:
    """A tensor of its shape whose memory is ``[B, L, H, D]``; for the fakes."""
    return like.new_empty_strided(like.shape, strides(like.shape, True))


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tokens_first(q), q.new_empty(q.shape[:3], dtype=dtype)


def _fake_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return [tokens_first(t) for t, need in zip((q, k, v), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, scale, causal, backend = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, y, lse, mask)
    ctx.settings = scale, causal, backend


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    scale, causal, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:3])
    found = iter(
        torch.ops.deltaops.attention_backward(
            grad_y, *ctx.saved_tensors, scale, causal, needs, backend
        )
    )
    return (*(next(found) if need else None for need in needs), None, None, None, None)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, str backend) "
    "-> (Tensor y, Tensor lse)",
    "attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, "
    "Tensor? mask, float scale, bool causal, bool[] needs, str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it as softmax(scale * q @ k.mT) @ v in torch instead.",
)
