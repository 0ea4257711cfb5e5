"""Autograd for ``cross_entropy``: a Function for eager calls, and the registered op.

Both save the logits (held by the model's output anyway), the targets and the state ``[M, 2]``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, CrossEntropyBackend, CrossEntropyCall
from deltaops.dispatch import select
from deltaops.reference.cross_entropy import work_dtype

from .registered import register


def run_forward(
    logits: Tensor, target: Tensor, ignore_index: int, mean: bool, runner: Backend
) -> tuple[Tensor, Tensor]:
    """``(loss, state)``."""
    backend = cast(CrossEntropyBackend, runner)
    return backend.cross_entropy_forward(logits, target, ignore_index, mean)


class CrossEntropyFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, mean: bool, runner: Backend
    ) -> Tensor:
        loss, state = run_forward(logits, target, ignore_index, mean, runner)
        ctx.save_for_backward(logits, target, state)
        ctx.settings = ignore_index, mean, runner
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        ignore_index, mean, runner = ctx.settings
        logits, target, state = ctx.saved_tensors
        backend = cast(CrossEntropyBackend, runner)
        grad = backend.cross_entropy_backward(grad_loss, logits, target, state, ignore_index, mean)
        return grad, None, None, None, None


# --------------------------------------------------------------------------------- registered op


def _op_forward(
    logits: Tensor, target: Tensor, ignore_index: int, mean: bool, backend: str
) -> tuple[Tensor, Tensor]:
    runner = select(CrossEntropyCall.of(logits), backend)
    return run_forward(logits, target, ignore_index, mean, runner)


def _op_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    state: Tensor,
    ignore_index: int,
    mean: bool,
    backend: str,
) -> Tensor:
    runner = cast(CrossEntropyBackend, select(CrossEntropyCall.of(logits), backend))
    return runner.cross_entropy_backward(grad_loss, logits, target, state, ignore_index, mean)


def _fake_forward(
    logits: Tensor, target: Tensor, ignore_index: int, mean: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = work_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0], 2), dtype=dtype)


def _fake_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    state: Tensor,
    ignore_index: int,
    mean: bool,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ignore_index, mean, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1])
    ctx.settings = ignore_index, mean, backend


def _op_autograd(ctx: Any, grad_loss: Tensor, _grad_state: Tensor | None) -> tuple[Any, ...]:
    grad = torch.ops.deltaops.cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.settings)
    return grad, None, None, None, None


register(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, bool mean, str backend) "
    "-> (Tensor loss, Tensor state)",
    "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor state, "
    "int ignore_index, bool mean, str backend) -> Tensor",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Compute it with torch.nn.functional.cross_entropy instead.",
)
