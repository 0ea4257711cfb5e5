"""A quantised frozen linear layer and all its deltas (QLoRA), as one op.

    y = x Wᵀ + bias + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ,    W = codes · scales

:func:`delta_linear` of the weight that the codes stand for, which is not kept: it is made anew in
each pass, or for few rows on a GPU never leaves the product. Only eager calls do so; a compiler or
a transform sees the weight's making, and what it keeps of it is its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import DeltaLinearPlan, QuantizedPlan
from deltaops.errors import ConfigError, DeviceError, DtypeError, GradientError, ShapeError
from deltaops.reference import quantized as reference
from deltaops.reference.quantized import QuantizedWeight

from .delta_linear import Branch, cast_layer, delta_linear, draw_seed, prepare, watched
from .delta_linear_autograd import run_backward, run_forward
from .paths import needs_grad, shaped

_CODES = {"int8": torch.int8, "nf4": torch.uint8}


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    *,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Apply a frozen linear layer of quantised weight together with its branches.

    Args:
        x: activations ``[..., K]``, floating point.
        weight: ``[N, K]`` in codes. Of bitsandbytes' int8: its ``CB`` and ``SCB / 127``; of its
            NF4: the packed bytes, flattened, and ``absmax``, itself dequantised where it is nested.
        bias: ``[N]`` or None, dtype of ``x``; may be trainable.
        branches: as :func:`delta_linear` takes them.
        backend: of the products, as :func:`delta_linear` takes it.
        strict: as :func:`delta_linear` takes it.
    Returns: ``[..., N]`` in the dtype of ``x`` (under autocast, in autocast's dtype).
    Raises: what :func:`delta_linear` raises, of ``weight`` too.
    Gradients: those of :func:`delta_linear`; the backward pass reads the codes again, or makes W
        again where the gradient of ``x`` is wanted.
    Randomness: that of :func:`delta_linear`.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), eq. 5.
    """
    _check(x, weight)
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        if x.dtype != torch.float64 and x.is_floating_point():
            target = torch.get_autocast_dtype(device)
            x = x.to(target)
            _, bias, branches = cast_layer(x, bias, branches, target)
        with torch.autocast(device, enabled=False):
            return _run(x, weight, bias, branches, backend, strict)
    return _run(x, weight, bias, branches, backend, strict)


def _run(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    branches: Sequence[Branch],
    backend: str,
    strict: bool,
) -> Tensor:
    prepared = None
    if not watched():
        # what is known of a call hangs on the weight's layout, not on what is in it
        prepared = prepare(
            x, _stand_in(weight, x), bias, branches, None, backend, strict,
            like=lambda: torch.empty(weight.shape, dtype=x.dtype, device=x.device),
        )  # fmt: skip
    if prepared is None:
        dense = reference.dequantize(weight, x.dtype)
        return delta_linear(x, dense, bias, branches, backend=backend, strict=strict)
    (plan, random), operands, _ = prepared
    seed = draw_seed(x.device) if random else None
    if needs_grad(x, bias, *operands):
        y: Tensor = QuantizedLinearFunction.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            x, bias, seed, plan, weight, weight.codes, weight.scales, *operands
        )
        return y
    return _forward(x, weight, bias, operands, seed, plan, False)[0]


def _forward(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    operands: Sequence[Tensor | None],
    seed: Tensor | None,
    plan: DeltaLinearPlan,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if isinstance(plan, QuantizedPlan) and rows and plan.fuses(rows, weight):
        y, s = plan.forward_quantized(x.reshape(-1, k), weight, bias, operands, seed)
        return (y if x.dim() == 2 else shaped(y, (*x.shape[:-1], n))), s
    return run_forward(x, _dense(weight, x.dtype, plan), bias, operands, seed, plan, keep)


def _stand_in(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """One number in the weight's shape, where W itself is not read."""
    return torch.empty((1, 1), dtype=x.dtype, device=x.device).expand(weight.shape)


def _dense(weight: QuantizedWeight, dtype: torch.dtype, plan: DeltaLinearPlan) -> Tensor:
    if isinstance(plan, QuantizedPlan):
        return plan.dequantize(weight, dtype)
    return reference.dequantize(weight, dtype)


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: QuantizedWeight,
    operands: Sequence[Tensor | None],
    s: Tensor,
    seed: Tensor | None,
    needs: Sequence[bool],
    plan: DeltaLinearPlan,
) -> list[Tensor]:
    n, k = weight.shape
    rows = grad_y.numel() // n if n else 0
    if isinstance(plan, QuantizedPlan) and rows and plan.fuses(rows, weight):
        flat = None if x is None else x.reshape(-1, k)
        rest = operands, s, seed, needs
        grads = plan.backward_quantized(grad_y.reshape(-1, n), flat, weight, *rest)
        if needs[0] and grad_y.dim() != 2:
            grads[0] = shaped(grads[0], (*grad_y.shape[:-1], k))
        return grads
    # W is for the gradient of x alone
    dense = _dense(weight, grad_y.dtype, plan) if needs[0] else _stand_in(weight, grad_y)
    return run_backward(grad_y, x, dense, operands, s, seed, needs, plan)


class QuantizedLinearFunction(torch.autograd.Function):
    """Saves the codes and what :func:`delta_linear` saves beside its weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        plan: DeltaLinearPlan,
        weight: QuantizedWeight,
        codes: Tensor,
        scales: Tensor,
        *operands: Tensor | None,
    ) -> Tensor:
        y, s = _forward(x, weight, bias, operands, seed, plan, True)
        count = len(operands) // 3
        x_saved = x if True in ctx.needs_input_grad[7 : 7 + count] else None
        ctx.save_for_backward(x_saved, codes, scales, s, seed, *operands[: 2 * count])
        ctx.settings = plan, weight[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales, s, seed, *operands = ctx.saved_tensors
        plan, layout = ctx.settings
        operands += [None] * (len(operands) // 2)  # the branches' biases are not read again
        wants = ctx.needs_input_grad
        needs = [wants[0], wants[1], *wants[7:]]
        weight = QuantizedWeight(codes, scales, *layout)
        found = iter(_backward(grad_y.resolve_neg(), x, weight, operands, s, seed, needs, plan))
        grads = [next(found) if need else None for need in needs]
        return (*grads[:2], None, None, None, None, None, *grads[2:])


def _check(x: Tensor, weight: QuantizedWeight) -> None:
    codes, scales, (n, k), kind, block = weight
    if kind not in _CODES:
        raise ConfigError(
            f"quantized_linear: weight.kind must be one of {', '.join(_CODES)}, got {kind!r}. "
            "Check the spelling."
        )
    if block != k if kind == "int8" else block < 1:
        least = f"{k}, a row," if kind == "int8" else "at least 1"
        raise ConfigError(
            f"quantized_linear: weight.block must be {least} for {kind}, got {block}."
        )
    if codes.dtype != _CODES[kind]:
        raise DtypeError(
            f"quantized_linear: the codes of {kind} must be {_CODES[kind]}, got {codes.dtype}."
        )
    if scales.dtype != torch.float32:
        raise DtypeError(
            f"quantized_linear: scales must be torch.float32, got {scales.dtype}. Convert them; "
            "where they are codes themselves (nested), dequantise them first."
        )
    if needs_grad(scales):
        raise GradientError(
            "quantized_linear: scales are frozen, but they require a gradient. Call "
            "weight.scales.requires_grad_(False)."
        )
    count = n * k
    due = ((n, k), (n,)) if kind == "int8" else ((-(-count // 2),), (-(-count // block),))
    for name, tensor, shape in zip(("codes", "scales"), (codes, scales), due, strict=True):
        if tensor.shape != shape:
            raise ShapeError(
                f"quantized_linear: {name} of {kind} [{n}, {k}] in blocks of {block} must be "
                f"{list(shape)}, got {list(tensor.shape)}. Flatten them, or correct the shape."
            )
        if tensor.device != x.device:
            raise DeviceError(
                f"quantized_linear: {name} must be on the device of x, {x.device}, got "
                f"{tensor.device}. Move the model or the input."
            )
