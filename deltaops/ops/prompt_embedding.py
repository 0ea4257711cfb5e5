"""A trained prompt before the embeddings of tokens, as one op.

    y = [p₁ … p_P  E[t₁] … E[t_T]]

One gather instead of a lookup and a concatenation. Two ways in, as :mod:`deltaops.ops.rotary` has
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.dispatch import select
from deltaops.errors import DtypeError, ShapeError
from deltaops.reference import prompt_embedding as reference

from .paths import check_device, needs_grad, takes_bypass, transformed
from .prompt_embedding_autograd import (
    PromptEmbeddingFunction,
    call_of,
    refuse_table_gradient,
    run_forward,
)


def prompt_embedding(
    prompt: Tensor, ids: Tensor, table: Tensor, *, backend: str = "auto", strict: bool = False
) -> Tensor:
    """Put ``prompt`` before the rows of ``table`` that ``ids`` name, in each sequence.

    Args:
        prompt: ``[P, D]``, floating point; rounded to the dtype of ``table``.
        ids: ``[B, T]``, int64 or int32. One that is no row of the table raises IndexError on a
            CPU; the Triton kernel makes NaN of its embedding.
        table: E ``[V, D]``, floating point, frozen.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[B, P + T, D]`` in the dtype of ``table``, under autocast too; contiguous.
    Raises: ShapeError, DtypeError, DeviceError, GradientError, NoBackendError.
    Gradients: ``prompt`` alone, first order: over the batch in its order, in float32 at least.
    Source: Lester et al. 2021 (arXiv 2104.08691), §2.
    """
    _check(prompt, ids, table)
    if transformed("prompt_embedding", backend, strict):
        return reference.forward(prompt, ids, table)
    if takes_bypass(prompt, ids, table):
        runner = select(call_of(prompt, ids, table), backend, strict)
        if needs_grad(prompt):
            y: Tensor = PromptEmbeddingFunction.apply(prompt, ids, table, runner)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return run_forward(prompt, ids, table, runner)
    if strict:
        backend = select(call_of(prompt, ids, table), backend, strict).name
    return torch.ops.deltaops.prompt_embedding(prompt, ids, table, backend)  # type: ignore[no-any-return]  # torch.ops has no types


def _check(prompt: Tensor, ids: Tensor, table: Tensor) -> None:
    if table.dim() != 2:
        raise ShapeError(f"prompt_embedding: table must be [V, D], got {list(table.shape)}.")
    if prompt.dim() != 2 or prompt.shape[1] != table.shape[1]:
        raise ShapeError(
            f"prompt_embedding: prompt must be [P, {table.shape[1]}] (D from table), "
            f"got {list(prompt.shape)}. Is it of another model?"
        )
    if ids.dim() != 2:
        raise ShapeError(f"prompt_embedding: ids must be [B, T], got {list(ids.shape)}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(
            f"prompt_embedding: ids must be int64 or int32, got {ids.dtype}. Convert them."
        )
    for name, tensor in (("prompt", prompt), ("table", table)):
        if not tensor.is_floating_point():
            raise DtypeError(
                f"prompt_embedding: {name} must be floating point, got {tensor.dtype}. Convert it."
            )
    check_device("prompt_embedding", "prompt", prompt, table, of="table")
    check_device("prompt_embedding", "ids", ids, table, of="table")
    if needs_grad(table):
        refuse_table_gradient(table)
