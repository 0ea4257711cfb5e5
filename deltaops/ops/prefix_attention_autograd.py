"""Autograd for ``prefix_attention``: as :mod:`deltaops.ops.attention_autograd`, with two more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, PrefixAttentionBackend, PrefixAttentionCall
from deltaops.dispatch import select
from deltaops.reference.heads import strides

from .registered import register

GRADIENTS = 5
"""Of q, k, v, prefix_k and prefix_v, the first arguments."""


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    runner: Backend,
) -> tuple[Tensor, Tensor]:
    return cast(PrefixAttentionBackend, runner).prefix_attention_forward(
        q, k, v, prefix_k, prefix_v, mask, scale, causal
    )


def run_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: Sequence[bool],
    runner: Backend,
) -> list[Tensor]:
    return cast(PrefixAttentionBackend, runner).prefix_attention_backward(
        grad_y, q, k, v, prefix_k, prefix_v, y, lse, mask, scale, causal, needs
    )


class PrefixAttentionFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        runner: Backend,
    ) -> Tensor:
        y, lse = run_forward(q, k, v, prefix_k, prefix_v, mask, scale, causal, runner)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, y, lse, mask)
        ctx.settings = scale, causal, runner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        scale, causal, runner = ctx.settings
        needs = ctx.needs_input_grad[:GRADIENTS]
        grad_y = grad_y.resolve_neg()
        q, k, v, prefix_k, prefix_v, y, lse, mask = ctx.saved_tensors
        found = iter(
            run_backward(
                grad_y, q, k, v, prefix_k, prefix_v, y, lse, mask, scale, causal, needs, runner
            )
        )
        return (*(next(found) if need else None for need in needs), None, None, None, None)


# --------------------------------------------------------------------------------- registered op


def _op_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    runner = select(PrefixAttentionCall.of(q, k, prefix_k, mask, causal), backend)
    return run_forward(q, k, v, prefix_k, prefix_v, mask, scale, causal, runner)


def _op_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    runner = select(PrefixAttentionCall.of(q, k, prefix_k, mask, causal), backend)
    return run_backward(
        grad_y, q, k, v, prefix_k, prefix_v, y, lse, mask, scale, causal, needs, runner
    )


def _tokens_first(like: Tensor) -> Tensor:
    return like.new_empty_strided(like.shape, strides(like.shape, True))


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _tokens_first(q), q.new_empty(q.shape[:3], dtype=dtype)


def _fake_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    y: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    own = [_tokens_first(t) for t, need in zip((q, k, v), needs, strict=False) if need]
    prefix = zip((prefix_k, prefix_v), needs[3:], strict=True)
    return [*own, *(t.new_empty(t.shape) for t, need in prefix if need)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, mask, scale, causal, backend = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*given, y, lse, mask)
    ctx.settings = scale, causal, backend


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    scale, causal, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:GRADIENTS])
    found = iter(
        torch.ops.deltaops.prefix_attention_backward(
            grad_y, *ctx.saved_tensors, scale, causal, needs, backend
        )
    )
    return (*(next(found) if need else None for need in needs), None, None, None, None)


register(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? mask, float scale, bool causal, str backend) -> (Tensor y, Tensor lse)",
    "prefix_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor prefix_k, "
    "Tensor prefix_v, Tensor y, Tensor lse, Tensor? mask, float scale, bool causal, bool[] needs, "
    "str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it as softmax(scale * q @ k.mT) @ v in torch instead.",
)
