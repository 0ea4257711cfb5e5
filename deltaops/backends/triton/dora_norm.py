"""``dora_norm``: one pass over the weight, sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaops.backends.calls import DoraNormCall

from . import core


def unsupported(call: DoraNormCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, call.adapter_dtype):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    return None


def forward(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """See :class:`deltaops.backends.base.DoraNormBackend`."""
    norms = torch.empty((weight.shape[0],), dtype=torch.float32, device=weight.device)
    if norms.numel():
        with core.device_of(weight):
            precision = core.kernels("precision")
            core.kernels("dora").row_norms(
                weight,
                a,
                b,
                norms,
                scaling=scaling,
                precision=precision.rank_precision(weight.dtype, []),
                exact=precision.rank_precision(weight.dtype, [norms]),
                capability=core.capability(weight),
            )
    return norms
