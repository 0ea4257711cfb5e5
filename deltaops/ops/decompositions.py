"""The ops in plain aten, for exporters that know none of ours.

    program = torch.export.export(model, inputs).run_decompositions(deltaops.ops.decompositions())
    torch.onnx.export(program, file)

Each is its reference, and so computes what the op does, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaops.reference import (
    attention,
    bottleneck,
    cross_entropy,
    delta_linear,
    dora_norm,
    gated,
    norm_bias,
    prefix_attention,
    prompt_embedding,
    rotary,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Registered op → the same in aten, for ``ExportedProgram.run_decompositions``.

    Those of forward passes: what is exported does not train.
    """
    ops = torch.ops.deltaops
    return {
        ops.delta_linear.default: _delta_linear,
        ops.bottleneck.default: _bottleneck,
        ops.norm_bias.default: _norm_bias,
        ops.cross_entropy.default: lambda *given: cross_entropy.forward(*given[:-1]),
        ops.gated.default: lambda gate, up, activation, _backend: gated.forward(
            gate, up, activation
        ),
        ops.rotary.default: lambda x, cos, sin, _backend: rotary.forward(x, cos, sin, False),
        ops.attention.default: lambda *given: attention.forward(*given[:-1]),
        ops.prefix_attention.default: lambda *given: prefix_attention.forward(*given[:-1]),
        ops.prompt_embedding.default: lambda *given: prompt_embedding.forward(*given[:-1]),
        ops.dora_norm.default: lambda *given: dora_norm.forward(*given[:-1]),
    }


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _delta_linear(
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
    _backend: str,
) -> tuple[Tensor, Tensor]:
    present = iter(branch_bias)
    biases = [next(present) if there else None for there in biased]
    rows = None if adapter is None else adapter.reshape(-1)
    y, s = delta_linear.forward(
        _rows(x), weight, bias, a, b, biases, scaling, dropout, activation, seed, rows
    )
    return y.reshape(*x.shape[:-1], weight.shape[0]), s


def _bottleneck(x: Tensor, residual: Tensor | None, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, residual_is_x, _backend = given
    added = x if residual_is_x else residual
    y, h, stats = bottleneck.forward(_rows(x), None if added is None else _rows(added), *rest)
    return y.reshape(x.shape), h, stats


def _norm_bias(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    y, stats = norm_bias.forward(_rows(x), *given[:-1])
    return y.reshape(x.shape), stats
