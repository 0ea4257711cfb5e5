"""Autograd for ``delta_linear``, twice: a Function for eager calls, and the registered op.

Saved for the backward pass, by both: x (only where some ``a`` trains), W, A, B, S, the seed and the
rows' numbers;
no mask, no dropped-out x and no activation beside S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import DeltaLinearCall, DeltaLinearPlan
from deltaops.dispatch import select
from deltaops.errors import ConfigError, GradientError

from .paths import shaped
from .plans import make_plan
from .registered import register


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Sequence[Tensor | None],
    seed: Tensor | None,
    plan: DeltaLinearPlan,
    keep: bool,
    adapter: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y, and S where ``keep`` asks for what the backward pass needs."""
    if x.dim() == 2:
        return plan.forward(x, weight, bias, operands, seed, keep, adapter)
    n, k = weight.shape
    y, s = plan.forward(x.reshape(-1, k), weight, bias, operands, seed, keep, adapter)
    return shaped(y, (*x.shape[:-1], n)), s


def run_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    operands: Sequence[Tensor | None],
    s: Tensor,
    seed: Tensor | None,
    needs: Sequence[bool],
    plan: DeltaLinearPlan,
    adapter: Tensor | None = None,
) -> list[Tensor]:
    if grad_y.dim() == 2:
        return plan.backward(grad_y, x, weight, operands, s, seed, needs, adapter)
    n, k = weight.shape
    flat = None if x is None else x.reshape(-1, k)
    grads = plan.backward(grad_y.reshape(-1, n), flat, weight, operands, s, seed, needs, adapter)
    if needs[0]:
        grads[0] = shaped(grads[0], (*grad_y.shape[:-1], k))
    return grads


class DeltaLinearFunction(torch.autograd.Function):
    """The eager path. Saves x (only for grad_a; it is held upstream anyway), S and the seed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        adapter: Tensor | None,
        plan: DeltaLinearPlan,
        *operands: Tensor | None,  # a…, b…, branch_bias…: the last ones may be None
    ) -> Tensor:
        y, s = run_forward(x, weight, bias, operands, seed, plan, True, adapter)
        count = len(operands) // 3
        x_saved = x if True in ctx.needs_input_grad[6 : 6 + count] else None
        ctx.save_for_backward(x_saved, weight, s, seed, adapter, *operands[: 2 * count])
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable switches gradients off and on, in Python; they are off already where
        # no second order is asked for
        gradients = _once_differentiable if torch.is_grad_enabled() else _gradients
        return gradients(ctx, grad_y.resolve_neg())


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, s, seed, adapter, *operands = ctx.saved_tensors
    operands += [None] * (len(operands) // 2)  # the branches' biases are not read again
    wants = ctx.needs_input_grad
    needs = [wants[0], wants[2], *wants[6:]]
    found = iter(run_backward(grad_y, x, weight, operands, s, seed, needs, ctx.plan, adapter))
    grads = [next(found) if need else None for need in needs]
    return (grads[0], None, grads[1], None, None, None, *grads[2:])


_once_differentiable = once_differentiable(_gradients)


def row_ids(adapter: Tensor | None, branches: int) -> Tensor | None:
    """``adapter`` as backends take it, int32 ``[M]``.

    On the CPU its numbers are looked at; on a GPU that would wait for the stream, and there a
    number that is no branch's stands for none.

    Raises: ConfigError for a number that is neither a branch's nor −1.
    """
    if adapter is None:
        return None
    if adapter.is_cpu and adapter.numel():
        low, high = (int(t) for t in torch.aminmax(adapter))
        if low < -1 or high >= branches:
            raise ConfigError(
                f"delta_linear: adapter must hold numbers of the {branches} branches, 0 to "
                f"{branches - 1}, or -1 for rows without any, got {low if low < -1 else high}."
            )
    return adapter.reshape(-1).to(torch.int32).contiguous()


# --------------------------------------------------------------------------------- registered op


def _op_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    branch_bias: list[Tensor],
    biased: list[bool],
    scaling: list[float],
    dropout: list[float],
    activation: list[str],
    seed: Tensor | None,
    adapter: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    present = iter(branch_bias)
    biases = [next(present) if there else None for there in biased]
    routed = adapter is not None
    runner = select(DeltaLinearCall.of(x, weight, a, biases, dropout, activation, routed), backend)
    plan = make_plan(runner, weight, a, b, biases, scaling, dropout, activation)
    ids = row_ids(adapter, len(a))
    y, s = run_forward(x, weight, bias, [*a, *b, *biases], seed, plan, True, ids)
    assert s is not None  # kept, as asked
    return y, s


def _op_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    scaling: list[float],
    dropout: list[float],
    activation: list[str],
    seed: Tensor | None,
    needs: list[bool],
    adapter: Tensor | None,
    backend: str,
) -> list[Tensor]:
    # grad_y [..., N] stands for x [..., K]: the call differs in nothing that a backend looks at
    n, _k = weight.shape
    no_bias = [None] * len(a)
    routed = adapter is not None
    call = DeltaLinearCall.of(grad_y, weight, a, no_bias, dropout, activation, routed)
    biased = any(needs[2 + 2 * len(a) :])
    call = call._replace(m=grad_y.numel() // n if n else 0, branch_bias=biased)
    runner = select(call, backend)
    plan = make_plan(runner, weight, a, b, no_bias, scaling, dropout, activation)
    ids = row_ids(adapter, len(a))
    return run_backward(grad_y, x, weight, [*a, *b, *no_bias], s, seed, needs, plan, ids)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    branch_bias: list[Tensor],
    biased: list[bool],
    scaling: list[float],
    dropout: list[float],
    activation: list[str],
    seed: Tensor | None,
    adapter: Tensor | None,
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
    activation: list[str],
    seed: Tensor | None,
    needs: list[bool],
    adapter: Tensor | None,
    backend: str,
) -> list[Tensor]:
    n, k = weight.shape
    outputs = [
        grad_y.new_empty((*grad_y.shape[:-1], k)),
        grad_y.new_empty((n,)),
        *(t.new_empty(t.shape) for t in (*a, *b)),
        *(t.new_empty((t.shape[0],)) for t in a),
    ]
    return [t for t, need in zip(outputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _bias, a, b, branch_bias, biased, *settings = inputs
    scaling, dropout, activation, seed, adapter, backend = settings
    if weight.requires_grad:
        raise GradientError("deltaops::delta_linear: weight is frozen, but requires a gradient.")
    ctx.mark_non_differentiable(output[1])
    need_a = any(t.requires_grad for t in a)
    ctx.save_for_backward(x if need_a else None, weight, output[1], seed, adapter, *a, *b)
    ctx.settings = biased, scaling, dropout, activation, backend
    ctx.adapters_need = [[t.requires_grad for t in tensors] for tensors in (a, b, branch_bias)]


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_s: Tensor | None) -> tuple[Any, ...]:
    x, weight, s, seed, adapter, *adapters = ctx.saved_tensors
    biased, scaling, dropout, activation, backend = ctx.settings
    needs_a, needs_b, needs_present = ctx.adapters_need
    count = len(needs_a)
    flags = iter(needs_present)
    needs_bias = [next(flags) if there else False for there in biased]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *needs_a, *needs_b, *needs_bias]
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
            activation,
            seed,
            needs,
            adapter,
            backend,
        )
    )
    grads = [next(found) if need else None for need in needs]
    grad_a, grad_b, all_biases = (grads[2 + j * count : 2 + (j + 1) * count] for j in range(3))
    grad_present = [grad for grad, there in zip(all_biases, biased, strict=True) if there]
    # torch takes an empty list for one of tensors, whose gradient is a list again
    settings: list[list[Any] | None] = [None if biased else []] * 4
    return (grads[0], None, grads[1], grad_a, grad_b, grad_present, *settings, None, None, None)


register(
    "delta_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, "
    "Tensor[] branch_bias, bool[] biased, float[] scaling, float[] dropout, str[] activation, "
    "Tensor? seed, Tensor? adapter, str backend) -> (Tensor y, Tensor s)",
    "delta_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor[] a, Tensor[] b, "
    "Tensor s, float[] scaling, float[] dropout, str[] activation, Tensor? seed, bool[] needs, "
    "Tensor? adapter, str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it with backend='reference' in eager torch functions instead.",
)
