"""``delta_linear`` on a quantised weight: codes read in the products, or W made once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaops.reference.quantized import QuantizedWeight, nf4_table

from . import branches, core, delta_linear


def fuses(m: int, weight: QuantizedWeight) -> bool:
    """Whether a product of M rows reads the codes itself."""
    return bool(
        core.kernels("quantized").takes(m, weight.shape[1], weight.kind == "nf4", weight.block)
    )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """See :class:`deltaops.backends.base.QuantizedPlan`."""
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    dense = torch.empty(weight.shape, dtype=dtype, device=codes.device)
    if dense.numel():
        with core.device_of(codes):
            core.kernels("quantized").dequantize(
                codes, scales, _table(weight), dense, nf4=weight.kind == "nf4", block=weight.block
            )
    return dense


def forward(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(y, S)`` of :func:`deltaops.backends.triton.delta_linear.forward`, where it ``fuses``."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    with core.device_of(x):
        precision = core.kernels("precision").rank_precision(x.dtype, a)
        s, u = branches.project(x, a, branch_bias, scaling, dropout, activation, seed)
        if y.numel():
            codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
            core.kernels("quantized").forward_quantized(
                x, codes, scales, _table(weight),
                None if bias is None else bias.contiguous(), u, list(b), y,
                nf4=weight.kind == "nf4", block=weight.block, precision=precision,
            )  # fmt: skip
    return y, s


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: QuantizedWeight,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As :func:`deltaops.backends.triton.delta_linear.backward`, where it ``fuses``."""

    def write(grad_x: Tensor, grad_s: Tensor) -> None:
        downs = core.kernels("grad_input").Downs.of_layer(grad_s, a, dropout, seed)
        core.kernels("quantized").grad_input_quantized(
            grad_y, weight.codes.contiguous(), weight.scales.contiguous(), _table(weight), downs,
            grad_x, nf4=weight.kind == "nf4", block=weight.block,
            precision=core.kernels("precision").rank_precision(grad_y.dtype, a),
        )  # fmt: skip

    settings = scaling, dropout, activation
    return delta_linear.gradients(
        grad_y, x, weight.shape[1], a, b, s, *settings, seed, needs, None, write=write
    )


_tables: dict[torch.device, Tensor] = {}


def _table(weight: QuantizedWeight) -> Tensor | None:
    """NF4's values on the device of its codes, None for int8. Copied there once, in a device's
    first call, which therefore cannot be captured in a graph: torch raises there."""
    if weight.kind != "nf4":
        return None
    device = weight.codes.device
    found = _tables.get(device)
    if found is None:
        found = _tables[device] = nf4_table(device)
    return found
