"""The loss behind a language model's head, as one op.

    loss = Σₘ (log Σᵥ exp(xₘᵥ) − xₘₜ),  t = targetₘ

The logits [M,V] are read once forward, and read once and written once backward; eager torch keeps
their log-softmax, a matrix as large, and walks over it again and again. Two ways in, as
:mod:`deltaops.ops.delta_linear` has them: an ``autograd.Function`` for eager calls, the registered
op ``deltaops::cross_entropy`` for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.backends import CrossEntropyCall
from deltaops.dispatch import select
from deltaops.errors import ConfigError, DeviceError, DtypeError, ShapeError
from deltaops.reference import cross_entropy as reference

from .cross_entropy_autograd import CrossEntropyFunction, run_forward
from .paths import needs_grad, takes_bypass, transformed


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Cross-entropy between logits and class numbers, with no matrix of probabilities kept.

    NaN and +infinity in a row, or a row of nothing but −infinity, give NaN as in torch. An ignored
    row is not looked at: its gradient is 0 whatever it holds (torch makes NaN of a NaN there).

    Args:
        logits: ``[M, V]``, floating point; computed in float32 at least. Rows may be strided.
        target: ``[M]`` int64, each from 0 to V − 1 or ``ignore_index``.
        ignore_index: the target of rows that count for nothing.
        reduction: "mean" over the rows that count (NaN when none does), or "sum".
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: a scalar, float32 (float64 for float64 logits): under bfloat16 too.
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError; ValueError for a
        target that is no class.
    Gradients: ``logits``; first order. Beyond logits and targets, 8 bytes a row are kept.
    """
    _check(logits, target, reduction)
    mean = reduction == "mean"
    if transformed("cross_entropy", backend, strict):
        return reference.forward(logits, target, ignore_index, mean)[0]
    if takes_bypass(logits, target):
        runner = select(CrossEntropyCall.of(logits), backend, strict)
        if needs_grad(logits):
            loss: Tensor = CrossEntropyFunction.apply(logits, target, ignore_index, mean, runner)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return loss
        return run_forward(logits, target, ignore_index, mean, runner)[0]
    if strict:
        backend = select(CrossEntropyCall.of(logits), backend, strict).name
    out, _ = torch.ops.deltaops.cross_entropy(logits, target, ignore_index, mean, backend)
    return out  # type: ignore[no-any-return]  # torch.ops has no types


def _check(logits: Tensor, target: Tensor, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}. "
            "For the loss of each row use torch.nn.functional.cross_entropy."
        )
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ShapeError(
            f"cross_entropy: logits must be [M, V] with V ≥ 1, got {list(logits.shape)}. "
            "Flatten the leading dimensions with reshape(-1, V)."
        )
    if target.shape != logits.shape[:1]:
        raise ShapeError(
            f"cross_entropy: target must be [{logits.shape[0]}] (M from logits), "
            f"got {list(target.shape)}. Flatten it as the logits were."
        )
    if not logits.is_floating_point():
        raise DtypeError(
            f"cross_entropy: logits must be floating point, got {logits.dtype}. Convert them."
        )
    if target.dtype != torch.int64:
        raise DtypeError(
            f"cross_entropy: target must be torch.int64, got {target.dtype}. Class probabilities "
            "are not taken; convert class numbers with .long()."
        )
    if target.device != logits.device:
        raise DeviceError(
            f"cross_entropy: target must be on the device of logits, {logits.device}, "
            f"got {target.device}. Move one of them."
        )
