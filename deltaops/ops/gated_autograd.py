"""Autograd for ``gated``: a Function for eager calls, and the registered op.

Both save gate, and up where a gradient of gate is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, GatedBackend, GatedCall
from deltaops.dispatch import select

from .made import Ahead
from .paths import shaped
from .registered import register


def call_of(gate: Tensor, up: Tensor | None, activation: str) -> GatedCall:
    """The call of these tensors; gate ``[..., K]``."""
    k = gate.shape[-1]
    device = "cpu" if gate.is_cpu else gate.device.type
    return GatedCall(device, gate.dtype, gate.numel() // k, k, activation, up is None)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _like(rows: Tensor, gate: Tensor) -> Tensor:
    """A result in the shape of gate, and contiguous as the fakes say: eager torch's, and so the
    reference's, has the strides of its inputs."""
    return shaped(rows.contiguous(), gate.shape)


def run_forward(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    runner: Backend,
    ahead: Ahead | None = None,
) -> Tensor:
    """y; and S of the layers of ``ahead``, which it then holds."""
    if ahead is not None and up is not None:
        with torch.no_grad():  # the factors train; their gradients are the layers' affair
            y, ahead.s = ahead.runner.gated_and_s(_rows(gate), _rows(up), ahead.members)
        return shaped(y, gate.shape)
    y = cast(GatedBackend, runner).gated_forward(
        _rows(gate), None if up is None else _rows(up), activation
    )
    return _like(y, gate)


def run_backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    needs: Sequence[bool],
    runner: Backend,
) -> list[Tensor]:
    grads = cast(GatedBackend, runner).gated_backward(
        _rows(grad_y), _rows(gate), None if up is None else _rows(up), activation, needs
    )
    return [_like(grad, gate) for grad in grads]


class GatedFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        runner: Backend,
        ahead: Ahead | None,
    ) -> Tensor:
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        ctx.settings = activation, runner
        return run_forward(gate, up, activation, runner, ahead)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        activation, runner = ctx.settings
        needs = ctx.needs_input_grad[:2]
        found = iter(run_backward(grad_y.resolve_neg(), gate, up, activation, needs, runner))
        return (*(next(found) if need else None for need in needs), None, None, None)


# --------------------------------------------------------------------------------- registered op


def _op_forward(gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return run_forward(gate, up, activation, select(call_of(gate, up, activation), backend))


def _op_backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    alone = up is None and not needs[1]  # else it was not kept: nobody wants a gradient of gate
    runner = select(call_of(gate, None if alone else gate, activation), backend)
    return run_backward(grad_y, gate, up, activation, needs, runner)


def _fake_forward(gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for need in needs if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, activation, backend = inputs
    ctx.save_for_backward(gate, up if gate.requires_grad else None)
    ctx.settings = activation, backend


def _op_autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    activation, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:2])
    found = iter(torch.ops.deltaops.gated_backward(grad_y, gate, up, activation, needs, backend))
    return (*(next(found) if need else None for need in needs), None, None)


register(
    "gated(Tensor gate, Tensor? up, str activation, str backend) -> Tensor",
    "gated_backward(Tensor grad_y, Tensor gate, Tensor? up, str activation, bool[] needs, "
    "str backend) -> Tensor[]",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it as torch.nn.functional.silu(gate) * up instead.",
)
