"""Rotary position embedding, as one op.

    y = x · cos + rot(x) · sin,    rot(x) = (−x₂, x₁)

It stands between q_proj or k_proj, whose output it reads as ``[B, L, H, D]`` memory seen through
a transpose, and attention. One pass each way; eager torch makes five forward (two products, a minus
sign, a concatenation, a sum). Two ways in, as :mod:`deltaops.ops.delta_linear` has them: an
``autograd.Function`` for eager calls, the registered op ``deltaops::rotary`` for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.dispatch import select
from deltaops.errors import DtypeError, ShapeError
from deltaops.reference import rotary as reference

from .paths import check_device, needs_grad, takes_bypass, transformed
from .rotary_autograd import (
    RotaryFunction,
    call_of,
    refuse_table_gradient,
    run_forward,
    tokens_first,
)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto", strict: bool = False
) -> Tensor:
    """Turn each head of ``x`` by the angles of its token.

    Args:
        x: ``[B, H, L, D]``, floating point, D even; computed in float32 at least and rounded once.
            Any strides: heads of adjacent elements are read where they lie.
        cos: ``[B, L, D]`` or, for the whole batch, ``[1, L, D]``, in the dtype of ``x`` or float32;
            both halves are read.
        sin: shape and dtype of ``cos``.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[B, H, L, D]`` in the dtype of ``x``, under autocast too. Its memory is dense and
        ordered as that of ``x``: ``[B, L, H, D]`` where tokens lie further apart than heads do,
        else ``[B, H, L, D]``.
    Raises: ShapeError, DtypeError, DeviceError, GradientError, NoBackendError.
    Gradients: ``x`` alone; first order. Nothing beyond ``cos`` and ``sin`` is kept.
    Source: Su et al. 2021 (arXiv 2104.09864), with D in halves as transformers' Llama has it.
    """
    check_angles(x, cos, sin)
    if transformed("rotary", backend, strict):
        return reference.forward(x, cos, sin, tokens_first(x))
    if takes_bypass(x, cos, sin):
        runner = select(call_of(x, cos), backend, strict)
        if needs_grad(x):
            y: Tensor = RotaryFunction.apply(x, cos, sin, runner)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return run_forward(x, cos, sin, runner)
    if strict:
        backend = select(call_of(x, cos), backend, strict).name
    return torch.ops.deltaops.rotary(x, cos, sin, backend)  # type: ignore[no-any-return]  # torch.ops has no types


def check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ShapeError, DtypeError, DeviceError or GradientError unless ``rotary`` takes these."""
    if x.dim() != 4 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ShapeError(
            f"rotary: x must be [B, H, L, D] with D even and at least 2, got {list(x.shape)}."
        )
    batch, _, length, width = x.shape
    if cos.dim() != 3 or cos.shape[1:] != (length, width) or cos.shape[0] not in (1, batch):
        raise ShapeError(
            f"rotary: cos must be [B or 1, L, D], here [{batch} or 1, {length}, {width}], "
            f"got {list(cos.shape)}. Are these the angles of the tokens of x?"
        )
    if sin.shape != cos.shape:
        raise ShapeError(
            f"rotary: sin must be {list(cos.shape)}, as cos is, got {list(sin.shape)}."
        )
    if not x.is_floating_point():
        raise DtypeError(f"rotary: x must be floating point, got {x.dtype}. Convert it.")
    if cos.dtype not in (x.dtype, torch.float32):
        raise DtypeError(
            f"rotary: cos must be {x.dtype}, as x is, or torch.float32, got {cos.dtype}. "
            "Convert cos and sin."
        )
    if sin.dtype != cos.dtype:
        raise DtypeError(
            f"rotary: cos and sin must share a dtype, got {cos.dtype} and {sin.dtype}. "
            "Convert one of them."
        )
    check_device("rotary", "cos", cos, x)
    check_device("rotary", "sin", sin, x)
    if needs_grad(cos, sin):
        refuse_table_gradient(cos, sin)
