"""Autograd for ``prefix_attention``: as :mod:`deltaops.ops.attention_autograd`, with two more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, PrefixAttentionBackend, PrefixAttentionCall
from deltaops.dispatch import select

from .attention_autograd import tokens_first
from .registered import register

GRADIENTS = 5
"""Of q, k, v, prefix_k and prefix_v, the first arguments."""


class Forward(NamedTuple):
    """What a forward pass takes; see :mod:`deltaops.reference.prefix_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    bias: Tensor | None


class Backward(NamedTuple):
    """What a backward pass takes."""

    grad_y: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    y: Tensor
    lse: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    bias: Tensor | None


def call_of(given: Forward | Backward) -> PrefixAttentionCall:
    """The call of these tensors."""
    return PrefixAttentionCall.of(
        given.q, given.k, given.prefix_k, given.mask, given.causal, given.bias
    )


def run_forward(runner: Backend, given: Forward) -> tuple[Tensor, Tensor]:
    *rest, bias = given
    run: Any = cast(PrefixAttentionBackend, runner).prefix_attention_forward
    found: tuple[Tensor, Tensor] = run(*rest, **_more(bias))
    return found


def run_backward(runner: Backend, given: Backward, needs: Sequence[bool]) -> list[Tensor]:
    *rest, bias = given
    run: Any = cast(PrefixAttentionBackend, runner).prefix_attention_backward
    found: list[Tensor] = run(*rest, needs, **_more(bias))
    return found


def _more(bias: Tensor | None) -> dict[str, Tensor]:
    """By name, and only where there is one: a backend that refuses biases need not know of them."""
    return {} if bias is None else {"bias": bias}


class PrefixAttentionFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # those of Forward, and who runs it
        *taken, ctx.runner = arguments
        given = Forward(*taken)
        y, lse = run_forward(ctx.runner, given)
        ctx.save_for_backward(*given[:GRADIENTS], y, lse, given.mask, given.bias)
        ctx.settings = given.scale, given.causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:GRADIENTS]
        *saved, bias = ctx.saved_tensors
        rest: tuple[Any, ...] = (*saved, *ctx.settings, bias)
        given = Backward(grad_y.resolve_neg(), *rest)
        found = iter(run_backward(ctx.runner, given, needs))
        return (*(next(found) if need else None for need in needs), *[None] * 5)


# --------------------------------------------------------------------------------- registered op


def _op_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend = arguments
    forward = Forward(*given)
    return run_forward(select(call_of(forward), backend), forward)


def _op_backward(*arguments: Any) -> list[Tensor]:
    *given, needs, backend = arguments
    backward = Backward(*given)
    return run_backward(select(call_of(backward), backend), backward, needs)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = Forward(*arguments[:-1]).q
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tokens_first(q), q.new_empty(q.shape[:3], dtype=dtype)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    *tensors, needs, _backend = arguments
    given = Backward(*tensors)
    made = [tokens_first(t) for t, need in zip(given[1:4], needs, strict=False) if need]
    prefix = zip((given.prefix_k, given.prefix_v), needs[3:], strict=True)
    return [*made, *(t.new_empty(t.shape) for t, need in prefix if need)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, mask, scale, causal, bias, backend = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*given, y, lse, mask, bias)
    ctx.settings = scale, causal, backend


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    scale, causal, backend = ctx.settings
    *saved, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:GRADIENTS])
    found = iter(
        torch.ops.deltaops.prefix_attention_backward(
            grad_y, *saved, scale, causal, bias, needs, backend
        )
    )
    return (*(next(found) if need else None for need in needs), *[None] * 5)


register(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
    "Tensor? mask, float scale, bool causal, Tensor? bias, str backend) -> (Tensor y, Tensor lse)",
    "prefix_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor prefix_k, "
    "Tensor prefix_v, Tensor y, Tensor lse, Tensor? mask, float scale, bool causal, Tensor? bias, "
    "bool[] needs, str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it as softmax(scale * q @ k.mT) @ v in torch instead.",
)
