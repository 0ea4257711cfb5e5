"""The product in the middle of a gated MLP (SwiGLU, GEGLU), as one op.

    y = φ(gate) · up

It stands between gate_proj and up_proj, whose outputs it multiplies, and down_proj. Forward moves
three matrices (gate, up, y) and backward five; eager torch moves five and nine, and keeps φ(gate)
too. Without up it is the activation of a plain MLP, which some models of transformers spell out in
eight steps of eager torch. Two ways in, as :mod:`deltaops.ops.delta_linear` has them: an
``autograd.Function`` for eager calls, the registered op ``deltaops::gated`` for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.dispatch import select
from deltaops.errors import ConfigError, DtypeError, ShapeError
from deltaops.reference import gated as reference
from deltaops.reference.activation import ACTIVATIONS

from .foresee import Readers, foresee
from .gated_autograd import GatedFunction, call_of, run_forward
from .paths import check_device, needs_grad, takes_bypass, transformed


def gated(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    *,
    readers: Readers | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Multiply ``up`` by the activation of ``gate``, element by element.

    Forward, NaN and the infinities give what torch's own activation and product give. Backward, the
    slope at an infinity is promised by no backend: where its formula multiplies infinity by 0, as
    that of "gelu_tanh" does, it is NaN in one and the limit in another.

    Args:
        gate: ``[..., K]``, floating point; computed in float32 at least and rounded once. Rows may
            be strided, as in the halves of one merged projection: ``merged.chunk(2, -1)``.
        up: ``[..., K]``, shape and dtype of ``gate``; its rows may be strided too. None for the
            activation alone.
        activation: φ: "identity", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        readers: gives the layers that will read the result, as :func:`deltaops.ops.norm_bias` has
            them.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[..., K]`` in the dtype of ``gate``, under autocast too.
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, NoBackendError.
    Gradients: ``gate`` and ``up``; first order. Nothing beyond these is kept.
    Source: Dauphin et al. 2017 (arXiv 1612.08083); Shazeer 2020 (arXiv 2002.05202).
    """
    _check(gate, up, activation)
    if transformed("gated", backend, strict):
        return reference.forward(gate, up, activation)
    if takes_bypass(gate, up):
        call = call_of(gate, up, activation)
        runner = select(call, backend, strict)
        ahead = foresee(gate, readers, call, runner, backend, strict)
        if needs_grad(gate, up):
            y: Tensor = GatedFunction.apply(gate, up, activation, runner, ahead)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
        else:
            y = run_forward(gate, up, activation, runner, ahead)
        if ahead is not None:
            ahead.leave(y)
        return y
    if strict:
        backend = select(call_of(gate, up, activation), backend, strict).name
    return torch.ops.deltaops.gated(gate, up, activation, backend)  # type: ignore[no-any-return]  # torch.ops has no types


def _check(gate: Tensor, up: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"gated: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    if gate.dim() == 0 or gate.shape[-1] < 1:
        raise ShapeError(f"gated: gate must be [..., K] with K ≥ 1, got {list(gate.shape)}.")
    if not gate.is_floating_point():
        raise DtypeError(f"gated: gate must be floating point, got {gate.dtype}. Convert it.")
    if up is None:
        return
    if up.shape != gate.shape:
        raise ShapeError(
            f"gated: up must be {list(gate.shape)}, as gate is, got {list(up.shape)}. "
            "Are both projections of the same width?"
        )
    if up.dtype != gate.dtype:
        raise DtypeError(
            f"gated: gate and up must share a dtype, got {gate.dtype} and {up.dtype}. "
            "Convert one of them."
        )
    check_device("gated", "up", up, gate, of="gate")
