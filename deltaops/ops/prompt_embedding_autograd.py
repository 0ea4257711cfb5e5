"""Autograd for ``prompt_embedding``: a Function for eager calls, and the registered op.

Nothing is kept: the gradient of the prompt is a sum of what comes in.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import Backend, PromptEmbeddingBackend, PromptEmbeddingCall
from deltaops.dispatch import select
from deltaops.errors import GradientError

from .registered import register


def call_of(prompt: Tensor, ids: Tensor, table: Tensor) -> PromptEmbeddingCall:
    """The call of these tensors."""
    device = "cpu" if table.is_cpu else table.device.type
    (length, d), (batch, tokens) = prompt.shape, ids.shape
    return PromptEmbeddingCall(device, table.dtype, prompt.dtype, batch, length, tokens, d)


def refuse_table_gradient(table: Tensor) -> None:
    """Raise GradientError where the table requires a gradient, which nobody would compute."""
    if table.requires_grad:
        raise GradientError(
            "prompt_embedding: table is frozen, but it requires a gradient. Call "
            "table.requires_grad_(False), or concatenate the prompt and the embeddings in torch."
        )


def run_forward(prompt: Tensor, ids: Tensor, table: Tensor, runner: Backend) -> Tensor:
    return cast(PromptEmbeddingBackend, runner).prompt_embedding_forward(prompt, ids, table)


def run_backward(grad_y: Tensor, length: int, dtype: torch.dtype, runner: Backend) -> Tensor:
    found = cast(PromptEmbeddingBackend, runner)
    return found.prompt_embedding_backward(grad_y, length, dtype)


class PromptEmbeddingFunction(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, prompt: Tensor, ids: Tensor, table: Tensor, runner: Backend) -> Tensor:
        ctx.settings = prompt.shape[0], prompt.dtype, runner
        return run_forward(prompt, ids, table, runner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return run_backward(grad_y.resolve_neg(), *ctx.settings), None, None, None


# --------------------------------------------------------------------------------- registered op


def _op_forward(prompt: Tensor, ids: Tensor, table: Tensor, backend: str) -> Tensor:
    return run_forward(prompt, ids, table, select(call_of(prompt, ids, table), backend))


def _backward_call(grad_y: Tensor, length: int, dtype: torch.dtype) -> PromptEmbeddingCall:
    device = "cpu" if grad_y.is_cpu else grad_y.device.type
    batch, positions, d = grad_y.shape
    return PromptEmbeddingCall(device, grad_y.dtype, dtype, batch, length, positions - length, d)


def _op_backward(grad_y: Tensor, length: int, dtype: torch.dtype, backend: str) -> Tensor:
    runner = select(_backward_call(grad_y, length, dtype), backend)
    return run_backward(grad_y, length, dtype, runner)


def _fake_forward(prompt: Tensor, ids: Tensor, table: Tensor, backend: str) -> Tensor:
    (length, d), (batch, tokens) = prompt.shape, ids.shape
    return table.new_empty((batch, length + tokens, d))


def _fake_backward(grad_y: Tensor, length: int, dtype: torch.dtype, backend: str) -> Tensor:
    return grad_y.new_empty((length, grad_y.shape[2]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prompt, _ids, table, backend = inputs
    refuse_table_gradient(table)
    ctx.settings = prompt.shape[0], prompt.dtype, backend


def _op_autograd(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    grad = torch.ops.deltaops.prompt_embedding_backward(grad_y, *ctx.settings)
    return grad, None, None, None


register(
    "prompt_embedding(Tensor prompt, Tensor ids, Tensor table, str backend) -> Tensor",
    "prompt_embedding_backward(Tensor grad_y, SymInt length, ScalarType dtype, str backend) "
    "-> Tensor",
    forward=_op_forward,
    backward=_op_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    autograd=_op_autograd,
    instead="Concatenate the prompt and the embeddings in torch instead.",
)
