"""Autograd for ``delta_linear``, twice: a Function for eager calls, and the registered op.

Saved for the backward pass, by both: x (only where some ``a`` trains), W, A, B, S and the seed;
no mask and no dropped-out x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, DeltaLinearCall
from deltaops.dispatch import select
from deltaops.errors import GradientError


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    runner: Backend,
) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    y, s = runner.forward(flat, weight, bias, a, b, scaling, dropout, seed)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], n)), s


def run_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
    runner: Backend,
) -> list[Tensor]:
    n, k = weight.shape
    grad = grad_y if grad_y.dim() == 2 else grad_y.reshape(-1, n)
    flat = None if x is None else (x if x.dim() == 2 else x.reshape(-1, k))
    grads: list[Tensor] = runner.backward(
        grad, flat, weight, a, b, s, scaling, dropout, seed, needs
    )
    if needs[0] and grad_y.dim() != 2:
        grads[0] = grads[0].view(*grad_y.shape[:-1], k)
    return grads


class DeltaLinearFunction(torch.autograd.Function):
    """The eager path. Saves x (only for grad_a; it is held upstream anyway), S and the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: list[float],
        dropout: list[float],
        seed: Tensor | None,
        runner: Backend,
        *adapters: Tensor,
    ) -> Tensor:
        count = len(scaling)
        a, b = adapters[:count], adapters[count:]
        y, s = run_forward(x, weight, bias, a, b, scaling, dropout, seed, runner)
        needs = ctx.needs_input_grad
        x_saved = x if any(needs[7 : 7 + count]) else None
        ctx.save_for_backward(x_saved, weight, s, seed, *adapters)
        ctx.settings = scaling, dropout, runner
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, s, seed, *adapters = ctx.saved_tensors
        scaling, dropout, runner = ctx.settings
        count = len(scaling)
        wants = ctx.needs_input_grad
        needs = [wants[0], wants[2], *wants[7:]]
        found = iter(
            run_backward(
                grad_y,
                x,
                weight,
                adapters[:count],
                adapters[count:],
                s,
                scaling,
                dropout,
                seed,
                needs,
                runner,
            )
        )
        grads = [next(found) if need else None for need in needs]
        return (grads[0], None, grads[1], None, None, None, None, *grads[2:])


# --------------------------------------------------------------------------------- registered op

_library = torch.library.Library("deltaops", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


# No defaults: the dispatcher drops trailing ones, and needs_input_grad gets shorter.
_define(
    "delta_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, "
    "float[] scaling, float[] dropout, Tensor? seed, str backend) -> (Tensor y, Tensor s)",
)
_define(
    "delta_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor[] a, Tensor[] b, "
    "Tensor s, float[] scaling, float[] dropout, Tensor? seed, bool[] needs, str backend) "
    "-> Tensor[]",
)


def _op_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    runner = select(DeltaLinearCall.of(x, weight, a, dropout), backend)
    return run_forward(x, weight, bias, a, b, scaling, dropout, seed, runner)


def _op_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    # grad_y [..., N] stands for x [..., K]: the call differs in nothing that a backend looks at
    n, _k = weight.shape
    call = DeltaLinearCall.of(grad_y, weight, a, dropout)
    runner = select(call._replace(m=grad_y.numel() // n if n else 0), backend)
    return run_backward(grad_y, x, weight, a, b, s, scaling, dropout, seed, needs, runner)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    dtype = torch.promote_types(x.dtype, torch.float32)
    return y, x.new_empty((m, sum(t.shape[0] for t in a)), dtype=dtype)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    n, k = weight.shape
    outputs = [
        grad_y.new_empty((*grad_y.shape[:-1], k)),
        grad_y.new_empty((n,)),
        *(t.new_empty(t.shape) for t in (*a, *b)),
    ]
    return [t for t, need in zip(outputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _bias, a, b, scaling, dropout, seed, backend = inputs
    if weight.requires_grad:
        raise GradientError("deltaops::delta_linear: weight is frozen, but requires a gradient.")
    ctx.mark_non_differentiable(output[1])
    need_a = any(t.requires_grad for t in a)
    ctx.save_for_backward(x if need_a else None, weight, output[1], seed, *a, *b)
    ctx.settings = scaling, dropout, backend
    ctx.ranks = [t.requires_grad for t in a], [t.requires_grad for t in b]


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_s: Tensor | None) -> tuple[Any, ...]:
    x, weight, s, seed, *adapters = ctx.saved_tensors
    scaling, dropout, backend = ctx.settings
    needs_a, needs_b = ctx.ranks
    count = len(needs_a)
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *needs_a, *needs_b]
    found = iter(
        torch.ops.deltaops.delta_linear_backward(
            grad_y,
            x,
            weight,
            adapters[:count],
            adapters[count:],
            s,
            scaling,
            dropout,
            seed,
            needs,
            backend,
        )
    )
    grads = [next(found) if need else None for need in needs]
    grad_a, grad_b = grads[2 : 2 + count], grads[2 + count :]
    return (grads[0], None, grads[1], grad_a, grad_b, None, None, None, None)


def _no_second_order(ctx: Any, *_grads: Any) -> tuple[Any, ...]:
    raise GradientError(
        "delta_linear: gradients are of first order only; a second backward pass went through "
        "them. Compute it with backend='reference' in eager torch functions instead."
    )


for _name, _kernel in (("delta_linear", _op_forward), ("delta_linear_backward", _op_backward)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("deltaops::delta_linear", _fake_forward, lib=_library)
torch.library.register_fake("deltaops::delta_linear_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "deltaops::delta_linear", _op_autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("deltaops::delta_linear_backward", _no_second_order, lib=_library)
